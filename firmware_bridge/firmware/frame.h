/* Frames on the wire: PROTOCOL.md, "Framing". Hardware-free. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum { FRAME_MIN = 5, FRAME_MAX = 64, PAYLOAD_MAX = FRAME_MAX - FRAME_MIN, SEQUENCES = 16, SYNC = 0x7e };

struct frame {
    uint8_t sequence, size; /* of the payload */
    uint8_t payload[PAYLOAD_MAX];
};

struct decoder {
    uint8_t have, buffer[FRAME_MAX];
    uint32_t frames, bad_bytes, crc_errors;
};

/* Takes one byte; decoder_next must have returned false since the one before. */
void decoder_put(struct decoder *decoder, uint8_t byte);
/* The next complete frame, if there is one. */
bool decoder_next(struct decoder *decoder, struct frame *frame);
/* The line has gone quiet: the oldest byte begins no frame. */
void decoder_give_up(struct decoder *decoder);
/* Writes the frame of a payload of at most PAYLOAD_MAX bytes to out[FRAME_MAX]; returns its size. */
uint8_t frame_encode(uint8_t *out, uint8_t sequence, const void *payload, uint8_t size);
