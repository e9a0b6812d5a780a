/* The C parser and the core under damaged frames. As a libFuzzer target; and as a program of its own, which damages frames at random
 * and counts those that get through (fuzz FRAMES SEED), or takes what a libFuzzer kept once more (fuzz FILE …). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DICTIONARY_MESSAGES
#include "core.h"
#include "dictionary.h"
#include "frame.h"

_Noreturn void board_fail(uint8_t reset) {
    fprintf(stderr, "the firmware gave up: %d\n", reset);
    abort();
}

static uint32_t now_us;

static void pass(uint32_t us) {
    uint8_t byte;
    now_us += us;
    core_inputs(now_us >> 18 & 3, 1000, 200, 200);
    core_edge(now_us);
    core_step(now_us);
    while (core_transmit(&byte)) {}
    core_reboot();
}

static void receive(const uint8_t *data, size_t size) {
    for (size_t i = 0; i < size; i++) {
        core_receive(data[i], now_us);
        now_us += 22; /* at 460800 baud */
    }
}

/* The first byte says how the line is quiet after the first frames: how often, and for how long at a time, from 1/8 s to 16 s. All that the
 * core does after a while (an act's time, the missing heartbeat, the board's reset) lies within that. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int pauses = 8;
    now_us = 0;
    core_init(now_us, 0);
    for (size_t i = 1; i < size; i++) {
        receive(data + i, 1);
        for (int n = data[i] == SYNC ? data[0] % 8 : 0; n > 0 && pauses > 0; n--, pauses--)
            pass(125000u << (data[0] >> 5));
    }
    pass(1000);
    return 0;
}

#ifdef LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t size_max);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed);

/* Blind mutation gets past the CRC once in 65,536 times. So three of four inputs are mended afterwards: cut into frames that follow each
 * other in sequence, each with its CRC, and most of them as long as their command is. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t size_max, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, size_max);
    if (seed % 4 == 0)
        return size;
    uint8_t sequence = 0, payload[PAYLOAD_MAX];
    for (size_t at = 1; at + FRAME_MIN <= size;) {
        const uint8_t command = data[at + 2] % MESSAGE_COUNT;
        size_t bytes = seed % 4 == 1 || !COMMAND_BYTES[command] ? data[at] % FRAME_MAX : COMMAND_BYTES[command] + (size_t)FRAME_MIN;
        bytes = bytes < FRAME_MIN ? FRAME_MIN : bytes;
        if (bytes > size - at)
            break;
        memcpy(payload, data + at + 2, bytes - FRAME_MIN);
        if (seed % 4 > 1)
            payload[0] = command;
        at += frame_encode(data + at, sequence++ % SEQUENCES, payload, (uint8_t)(bytes - FRAME_MIN));
    }
    return size;
}
#endif

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

static int replay(int count, char **files) {
    for (int i = 0; i < count; i++) {
        uint8_t data[4096];
        FILE *file = fopen(files[i], "rb");
        if (!file) {
            perror(files[i]);
            return 1;
        }
        const size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d inputs\n", count);
    return 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && (argv[1][0] < '0' || argv[1][0] > '9'))
        return replay(argc - 1, argv + 1);
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
        receive(data, bytes);
        pass(1000);
    }
    printf("%ld frames, %u with a wrong CRC, %ld wrong ones accepted, %.1f expected\n", frames, decoder.crc_errors, wrong,
           decoder.crc_errors / 65535.0);
    return 0;
}
#endif
