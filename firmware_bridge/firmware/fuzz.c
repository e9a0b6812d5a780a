/* The C parser and the core under damaged frames. As a libFuzzer target, and as a program of its own: fuzz FRAMES SEED. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"
#include "dictionary.h"
#include "frame.h"

_Noreturn void board_fail(uint8_t reset) {
    fprintf(stderr, "the firmware gave up: %d\n", reset);
    abort();
}

static uint32_t now_us;

static void run_core(const uint8_t *data, size_t size) {
    uint8_t byte;
    for (size_t i = 0; i < size; i++) {
        core_receive(data[i], now_us);
        now_us += 22; /* at 460800 baud */
    }
    core_step(now_us += 1000);
    while (core_transmit(&byte)) {}
    core_reboot();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    core_init(now_us, 0);
    run_core(data, size);
    return 0;
}

#ifdef STANDALONE
static uint64_t state;

static uint32_t pick(uint32_t below) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1dull) >> 33) % below;
}

static size_t damage(uint8_t *data, size_t size) {
    for (uint32_t times = 1 + pick(4); times--;) {
        const size_t at = pick((uint32_t)size);
        switch (pick(6)) {
        case 0: /* flips, from four on: three and fewer are always caught */
            for (int i = 0; i < 4; i++)
                data[pick((uint32_t)size)] ^= (uint8_t)(1u << pick(8));
            break;
        case 1: data[at] = (uint8_t)pick(256); break;
        case 2: /* inserted */
            memmove(data + at + 1, data + at, size - at);
            data[at] = (uint8_t)pick(256);
            size++;
            break;
        case 3: /* dropped */
            if (size > 6) {
                memmove(data + at, data + at + 1, size - at - 1);
                size--;
            }
            break;
        case 4: /* doubled */
            memmove(data + at + 1, data + at, size - at);
            size++;
            break;
        default: /* a run of garbage that leaves head and tail: only the CRC can tell */
            for (size_t i = 2; i + 1 < size; i++)
                data[i] = (uint8_t)pick(256);
        }
    }
    return size;
}

int main(int argc, char **argv) {
    const long frames = argc > 1 ? atol(argv[1]) : 1000000;
    state = argc > 2 ? strtoull(argv[2], 0, 10) * 2 + 1 : 1;
    struct decoder decoder = {0};
    long wrong = 0;
    core_init(0, 0);
    for (long n = 0; n < frames; n++) {
        uint8_t data[FRAME_MAX + 16], payload[PAYLOAD_MAX];
        const uint8_t size = (uint8_t)pick(PAYLOAD_MAX + 1), sequence = (uint8_t)pick(SEQUENCES);
        for (int i = 0; i < size; i++)
            payload[i] = (uint8_t)pick(256);
        if (size)
            payload[0] = (uint8_t)pick(MESSAGE_COUNT);
        const size_t bytes = damage(data, frame_encode(data, sequence, payload, size));
        struct frame frame;
        for (size_t i = 0; i <= bytes || decoder.have; i++) {
            if (i < bytes)
                decoder_put(&decoder, data[i]);
            else
                decoder_give_up(&decoder);
            while (decoder_next(&decoder, &frame))
                wrong += frame.sequence != sequence || frame.size != size || memcmp(frame.payload, payload, size) != 0;
        }
        run_core(data, bytes);
    }
    printf("%ld frames, %u with a wrong CRC, %ld wrong ones accepted, %.1f expected\n", frames, decoder.crc_errors, wrong,
           decoder.crc_errors / 65535.0);
    return 0;
}
#endif
