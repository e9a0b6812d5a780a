/* The firmware without the chip: session, clock, acts, states. Everything it touches goes through these functions. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

struct outputs {
    uint16_t servo_us[2];      /* pan, tilt */
    uint16_t light_permille[3]; /* red, green, blue */
    bool amplifier, board_reset;
};

/* After a reset, for the reason `reset` (RESET_…). */
void core_init(uint32_t now_us, uint8_t reset);
/* A byte from the host. */
void core_receive(uint8_t byte, uint32_t now_us);
/* Time passes; to be called at least every millisecond or so. */
void core_step(uint32_t now_us);
/* An edge of the tick was taken at `at_us`; returns the length of the tick that has begun, in µs. */
uint32_t core_edge(uint32_t at_us);
/* What the inputs are. */
void core_inputs(uint8_t flags, uint16_t battery_pin_mv, int16_t temperature_a, int16_t temperature_b);
/* The receive buffer was full. */
void core_rx_dropped(void);
/* Takes one byte for the host; false when there is none. */
bool core_transmit(uint8_t *byte);
/* What the outputs shall be. */
const struct outputs *core_outputs(void);
/* Takes the reboot that was asked for (REBOOT_…); -1 when none was. */
int core_reboot(void);

/* Provided by the board, or by the test: something cannot be (RESET_ASSERTION). Does not return. */
_Noreturn void board_fail(uint8_t reset);
