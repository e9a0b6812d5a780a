/* The frame codec, byte for byte the same decisions as firmware_bridge/framing.py. */
#include "frame.h"

#include <string.h>

enum { SEQUENCE_TAG = 0x10, MORE = -1 };

static uint16_t crc16(const uint8_t *data, uint8_t size) {
    uint16_t crc = 0xffff;
    while (size--) {
        crc ^= (uint16_t)(*data++ << 8);
        for (int bit = 0; bit < 8; bit++)
            crc = (uint16_t)(crc & 0x8000 ? crc << 1 ^ 0x1021 : crc << 1);
    }
    return crc;
}

uint8_t frame_encode(uint8_t *out, uint8_t sequence, const void *payload, uint8_t size) {
    out[0] = (uint8_t)(FRAME_MIN + size);
    out[1] = (uint8_t)(SEQUENCE_TAG | sequence % SEQUENCES);
    if (size)
        memcpy(out + 2, payload, size);
    const uint16_t crc = crc16(out, (uint8_t)(size + 2));
    out[size + 2] = (uint8_t)(crc >> 8);
    out[size + 3] = (uint8_t)crc;
    out[size + 4] = SYNC;
    return out[0];
}

/* Size of the frame that begins at the oldest byte; 0 if none does; MORE if it takes more bytes to tell. */
static int size_at_front(struct decoder *decoder) {
    const uint8_t *buffer = decoder->buffer;
    const int size = buffer[0];
    if (decoder->have == 0)
        return MORE;
    if (size < FRAME_MIN || size > FRAME_MAX)
        return 0;
    if (decoder->have >= 2 && (buffer[1] & ~(SEQUENCES - 1)) != SEQUENCE_TAG)
        return 0;
    if (decoder->have < size)
        return MORE;
    if (buffer[size - 1] != SYNC)
        return 0;
    if (crc16(buffer, (uint8_t)(size - 1)) != 0) { /* over data and its own CRC it is 0 */
        decoder->crc_errors++;
        return 0;
    }
    return size;
}

static void drop(struct decoder *decoder, int bytes) {
    decoder->have = (uint8_t)(decoder->have - bytes);
    memmove(decoder->buffer, decoder->buffer + bytes, decoder->have);
}

void decoder_put(struct decoder *decoder, uint8_t byte) {
    decoder->buffer[decoder->have++] = byte; /* never full: decoder_next leaves at most 63 */
}

bool decoder_next(struct decoder *decoder, struct frame *frame) {
    int size;
    while ((size = size_at_front(decoder)) != MORE) {
        if (size) {
            frame->sequence = decoder->buffer[1] % SEQUENCES;
            frame->size = (uint8_t)(size - FRAME_MIN);
            memcpy(frame->payload, decoder->buffer + 2, frame->size);
            drop(decoder, size);
            decoder->frames++;
            return true;
        }
        decoder_give_up(decoder);
    }
    return false;
}

void decoder_give_up(struct decoder *decoder) {
    if (decoder->have) {
        decoder->bad_bytes++;
        drop(decoder, 1);
    }
}
