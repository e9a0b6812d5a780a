"""The loop behind a WebSocket: OpenAI's Realtime events for programs, and a page for people."""
