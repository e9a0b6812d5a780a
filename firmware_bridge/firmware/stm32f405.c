/* The reference board: STM32F405. Clocks, pins, timers, serial line, watchdog, and the loop that feeds the core.
 *
 *   USART1 PA9 (out) PA10 (in)     host, 460800 baud 8N1
 *   TIM2   PA5 (CH1)               SYNC: toggles at every edge of the tick, by the timer itself
 *   TIM3   PA6 pan, PA7 tilt       servos, 50 Hz
 *   TIM4   PB6 R, PB7 G, PB8 B     light ring through three transistors, 1 kHz
 *   PB0    amplifier (high: on)    PB1 board's reset (open drain, low: reset)
 *   PC0    mute switch's second contact (high: muted; its first one cuts the microphone's supply)   PC1 button (high: pressed)
 *   PC2    battery through a divider   PC3, PC4 temperature sensors of 10 mV/K, 500 mV at 0 °C (TMP36)
 *
 * Numbers in comments such as RM0090 6.3.2 are sections of ST's reference manual.
 */
#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "dictionary.h"

#ifndef TIMER_MHZ
#define TIMER_MHZ 84 /* what TIM2 … TIM4 count at; QEMU's machine: 1000 */
#endif

#define REGISTER(address) (*(volatile uint32_t *)(uintptr_t)(address))
#define TIMER(number, offset) REGISTER(0x40000000u + 0x400u * ((number) - 2u) + (offset))
#define GPIO(letter, offset) REGISTER(0x40020000u + 0x400u * ((letter) - 'A') + (offset))
#define USART1(offset) REGISTER(0x40011000u + (offset))
#define RCC(offset) REGISTER(0x40023800u + (offset))
#define ADC1(offset) REGISTER(0x40012000u + (offset))
#define IWDG(offset) REGISTER(0x40003000u + (offset))

enum { CR1 = 0x00, DIER = 0x0c, SR = 0x10, EGR = 0x14, CCMR1 = 0x18, CCMR2 = 0x1c, CCER = 0x20, CNT = 0x24, PSC = 0x28, ARR = 0x2c, CCR1 = 0x34 };
enum { MODER = 0x00, OTYPER = 0x04, PUPDR = 0x0c, IDR = 0x10, BSRR = 0x18, AFRL = 0x20, AFRH = 0x24 };
enum { USART_SR = 0x00, USART_DR = 0x04, USART_BRR = 0x08, USART_CR1 = 0x0c, RXNE = 1 << 5, TXE = 1 << 7, TXEIE = 1 << 7 };
enum { RX_BYTES = 1024, INPUTS_US = 10000, DEBOUNCE = 3, BAUD = 460800, USART_HZ = 84000000 };

/* Survives a reset: why the program ended itself. The linker script keeps it out of what start-up clears. */
static struct { uint32_t magic, reason; } last_words __attribute__((section(".noinit")));
enum { MAGIC_REASON = 0x5ad1057e, MAGIC_BOOTLOADER = 0x0b007104 };

extern uint32_t _data_load[], _data[], _data_end[], _bss[], _bss_end[], _stack_guard[], _stack_top[];
enum { GUARD = 0x57ac4a2d };

static volatile uint8_t rx[RX_BYTES];
static volatile uint16_t rx_in, rx_out;
static volatile uint32_t rx_dropped, edge_at, edges, next_edge, period = TICK_US;

static void wait_for_interrupt(void) { __asm volatile("wfi"); }
static void disable_interrupts(void) { __asm volatile("cpsid i" ::: "memory"); }
static void enable_interrupts(void) { __asm volatile("cpsie i" ::: "memory"); }

static _Noreturn void reset_chip(uint32_t magic, uint32_t reason) {
    last_words.magic = magic;
    last_words.reason = reason;
    __asm volatile("dsb" ::: "memory");
    REGISTER(0xe000ed0c) = 0x05fa0004; /* AIRCR: SYSRESETREQ */
    for (;;)
        wait_for_interrupt();
}

_Noreturn void board_fail(uint8_t reset) {
    disable_interrupts();
    reset_chip(MAGIC_REASON, reset);
}

/* --- interrupts: they only take what cannot wait; the loop does the rest --- */

/* The edge was at the compare value, however late this runs. */
static void take_edge(void) {
    if ((int32_t)(TIMER(2, CNT) - next_edge) < 0)
        return;
    edge_at = next_edge;
    edges++;
    next_edge += period;
    TIMER(2, CCR1) = next_edge;
}

static void tim2_handler(void) {
    TIMER(2, SR) = 0;
    take_edge();
}

static void systick_handler(void) {
    take_edge(); /* should the compare interrupt have been missed; QEMU's timer has none */
    if (_stack_guard[0] != GUARD)
        board_fail(RESET_STACK);
}

static void usart1_handler(void) {
    while (USART1(USART_SR) & RXNE) {
        const uint8_t byte = (uint8_t)USART1(USART_DR);
        const uint16_t next = (uint16_t)((rx_in + 1) % RX_BYTES);
        if (next == rx_out) {
            rx_dropped++;
        } else {
            rx[rx_in] = byte;
            rx_in = next;
        }
    }
    USART1(USART_CR1) &= ~(uint32_t)TXEIE; /* it has woken the loop, which sends on */
}

static void fault_handler(void) { board_fail(RESET_FAULT); }

/* --- set-up --- */

/* True when the bits come; the bound is for machines that have no such clock. */
static bool wait_for(const volatile uint32_t *address, uint32_t mask, uint32_t value) {
    for (int i = 0; i < 20000; i++)
        if ((*address & mask) == value)
            return true;
    return false;
}

/* 168 MHz from the 8 MHz crystal, or from the internal oscillator where the crystal does not start (RM0090 6.3.2). */
static void start_clocks(void) {
    RCC(0x00) |= 1u << 16; /* HSEON */
    const bool crystal = wait_for(&RCC(0x00), 1u << 17, 1u << 17);
    RCC(0x04) = (crystal ? 8u : 16u) | 336u << 6 | (crystal ? 1u << 22 : 0u) | 7u << 24; /* 1 MHz · 336 / 2 */
    RCC(0x00) |= 1u << 24;                                                             /* PLLON */
    REGISTER(0x40023c00) = 5u | 7u << 8;                                              /* flash: 5 wait states, caches, prefetch */
    if (wait_for(&RCC(0x00), 1u << 25, 1u << 25)) {
        RCC(0x08) = 2u | 5u << 10 | 4u << 13; /* from the PLL; APB1 / 4 (timers at 84 MHz), APB2 / 2 */
        wait_for(&RCC(0x08), 3u << 2, 2u << 2);
    }
    RCC(0x30) |= 7u;                          /* GPIOA … C */
    RCC(0x40) |= 7u;                          /* TIM2 … 4 */
    RCC(0x44) |= 1u << 4 | 1u << 8;           /* USART1, ADC1 */
    (void)RCC(0x44);                          /* the clocks need two cycles */
}

static void start_pins(void) {
    GPIO('B', BSRR) = 1u << 1 | 1u << 16;  /* board not in reset, amplifier muted, before they become outputs */
    GPIO('B', OTYPER) |= 1u << 1;
    GPIO('B', MODER) |= 1u << 0 | 1u << 2 | 2u << 12 | 2u << 14 | 2u << 16;
    GPIO('B', AFRL) |= 2u << 24 | 2u << 28;
    GPIO('B', AFRH) |= 2u;
    GPIO('A', AFRL) |= 1u << 20 | 2u << 24 | 2u << 28;
    GPIO('A', AFRH) |= 7u << 4 | 7u << 8;
    GPIO('A', PUPDR) |= 1u << 20; /* PA10: pulled up, so that no host is a quiet line */
    GPIO('A', MODER) |= 2u << 10 | 2u << 12 | 2u << 14 | 2u << 18 | 2u << 20;
    GPIO('C', PUPDR) |= 2u << 0 | 2u << 2;
    GPIO('C', MODER) |= 3u << 4 | 3u << 6 | 3u << 8;
}

/* Two or three PWM channels at 1 µs steps. */
static void start_pwm(unsigned timer, uint32_t length_us) {
    TIMER(timer, CCMR1) = 0x6868;
    TIMER(timer, CCMR2) = 0x0068;
    TIMER(timer, CCER) = 0x0111;
    TIMER(timer, PSC) = TIMER_MHZ - 1;
    TIMER(timer, ARR) = length_us - 1;
    TIMER(timer, EGR) = 1;
    TIMER(timer, CR1) = 0x81;
}

static void start_time(void) {
    TIMER(2, CCMR1) = 0x30; /* channel 1 toggles its pin on a match */
    TIMER(2, CCER) = 1;
    TIMER(2, CR1) = 1; /* enabled first: QEMU's timer wants it so */
    TIMER(2, DIER) = 1 << 1;
    TIMER(2, PSC) = TIMER_MHZ - 1;
    TIMER(2, ARR) = 0xffffffff;
    TIMER(2, EGR) = 1;
    TIMER(2, SR) = 0;
    next_edge = TIMER(2, CNT) + TICK_US;
    TIMER(2, CCR1) = next_edge;
    REGISTER(0xe000e014) = 168000 - 1; /* SysTick: 1 kHz; it only wakes the loop, so its accuracy does not matter */
    REGISTER(0xe000e018) = 0;
    REGISTER(0xe000e010) = 7;
    REGISTER(0xe000e100) = 1u << 28;        /* TIM2 */
    REGISTER(0xe000e104) = 1u << (37 - 32); /* USART1 */
}

static void start_serial(void) {
    USART1(USART_BRR) = (USART_HZ + BAUD / 2) / BAUD;
    USART1(USART_CR1) = 1u << 13 | RXNE | 1u << 3 | 1u << 2;
}

static void start_watchdog(void) { /* 500 ms; from now on it cannot be stopped */
    IWDG(0x00) = 0xcccc;
    IWDG(0x00) = 0x5555;
    IWDG(0x04) = 3; /* 32 kHz / 32 */
    IWDG(0x08) = 500;
    IWDG(0x00) = 0xaaaa;
}

static uint8_t reset_reason(void) {
    static const struct { uint8_t bit, reason; } FLAGS[] = {
        {29, RESET_WATCHDOG}, {28, RESET_SOFTWARE}, {27, RESET_POWER}, {25, RESET_BROWN_OUT}, {26, RESET_PIN},
    };
    const uint32_t flags = RCC(0x74);
    RCC(0x74) |= 1u << 24; /* forget them */
    const uint32_t magic = last_words.magic;
    last_words.magic = 0;
    if (magic == MAGIC_REASON && last_words.reason < RESET_COUNT)
        return (uint8_t)last_words.reason;
    for (unsigned i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
        if (flags >> FLAGS[i].bit & 1)
            return FLAGS[i].reason;
    return RESET_UNKNOWN;
}

/* --- the loop --- */

static void read_inputs(void) {
    static const uint8_t CHANNELS[] = {12, 13, 14};
    static uint16_t pin_mv[3];
    static uint8_t channel, stable, candidate, flags;
    if (ADC1(0x00) & 1u << 1) { /* EOC */
        pin_mv[channel] = (uint16_t)((ADC1(0x4c) & 0xfff) * 3300 / 4095);
        channel = (uint8_t)((channel + 1) % 3);
    }
    ADC1(0x34) = CHANNELS[channel];
    ADC1(0x08) = 1u | 1u << 30; /* on, and convert */
    const uint8_t seen = (uint8_t)(GPIO('C', IDR) & 3);
    stable = seen == candidate ? (uint8_t)(stable + (stable < DEBOUNCE)) : 0;
    candidate = seen;
    if (stable == DEBOUNCE)
        flags = seen;
    core_inputs(flags, pin_mv[0], (int16_t)(pin_mv[1] - 500), (int16_t)(pin_mv[2] - 500));
}

static void apply_outputs(const struct outputs *outputs) {
    for (unsigned i = 0; i < 2; i++)
        TIMER(3, CCR1 + 4 * i) = outputs->servo_us[i];
    for (unsigned i = 0; i < 3; i++)
        TIMER(4, CCR1 + 4 * i) = outputs->light_permille[i];
    GPIO('B', BSRR) = (outputs->amplifier ? 1u << 0 : 1u << 16) | (outputs->board_reset ? 1u << 17 : 1u << 1);
}

static void transmit(void) {
    uint8_t byte;
    while (USART1(USART_SR) & TXE) {
        if (!core_transmit(&byte))
            return;
        USART1(USART_DR) = byte;
    }
    disable_interrupts();
    USART1(USART_CR1) |= TXEIE;
    enable_interrupts();
}

static __attribute__((noinline)) uint32_t overflow_stack(volatile uint32_t depth) {
    volatile uint32_t here[16] = {depth};
    if ((uintptr_t)here > (uintptr_t)_stack_guard + 96)
        here[1] = overflow_stack(depth + 1);
    else
        _stack_guard[0] = depth; /* the next frame would lie here */
    return here[0] + here[1];
}

static void reboot(int how) {
    while (!(USART1(USART_SR) & 1u << 6)) {} /* TC: the last byte is out */
    switch (how) {
    case REBOOT_BOOTLOADER: reset_chip(MAGIC_BOOTLOADER, 0);
    case REBOOT_ASSERTION: board_fail(RESET_ASSERTION);
    case REBOOT_STACK: overflow_stack(0); break; /* SysTick sees it */
    case REBOOT_HANG: for (;;) {}
    default: reset_chip(MAGIC_REASON, RESET_SOFTWARE);
    }
}

static _Noreturn void run(void) {
    uint32_t seen_edges = 0, seen_dropped = 0, inputs_at = TIMER(2, CNT);
    for (;;) {
        while (rx_out != rx_in) {
            core_receive(rx[rx_out], TIMER(2, CNT));
            rx_out = (uint16_t)((rx_out + 1) % RX_BYTES);
        }
        for (; seen_dropped != rx_dropped; seen_dropped++)
            core_rx_dropped();
        if (seen_edges != edges) {
            seen_edges = edges;
            period = core_edge(edge_at);
        }
        const uint32_t now = TIMER(2, CNT);
        if (now - inputs_at >= INPUTS_US) {
            inputs_at = now;
            read_inputs();
        }
        core_step(now);
        apply_outputs(core_outputs());
        transmit();
        const int how = core_reboot();
        if (how >= 0)
            reboot(how);
        IWDG(0x00) = 0xaaaa;
        disable_interrupts(); /* a byte that comes between the look and the sleep still ends the sleep */
        if (rx_out == rx_in)
            wait_for_interrupt();
        enable_interrupts();
    }
}

static _Noreturn void start(void) {
    /* cppcheck-suppress comparePointers ; the linker script lays them out */
    for (uint32_t *from = _data_load, *to = _data; to < _data_end;)
        *to++ = *from++;
    /* cppcheck-suppress comparePointers */
    for (uint32_t *to = _bss; to < _bss_end;)
        *to++ = 0;
    _stack_guard[0] = GUARD;
    start_clocks();
    start_pins();
    start_pwm(3, 20000);
    start_pwm(4, 1000);
    start_time();
    const uint8_t reset = reset_reason();
    core_init(TIMER(2, CNT), reset);
    start_serial();
    start_watchdog();
    enable_interrupts();
    run();
}

/* Entry: before anything else, as the chip's loader wants the chip as a reset leaves it. */
_Noreturn void reset_handler(void);
_Noreturn void reset_handler(void) {
    if (last_words.magic == MAGIC_BOOTLOADER) {
        last_words.magic = 0;
        const uint32_t *loader = (const uint32_t *)(uintptr_t)0x1fff0000;
        __asm volatile("msr msp, %0\n bx %1" ::"r"(loader[0]), "r"(loader[1]));
        __builtin_unreachable();
    }
    REGISTER(0xe000ed88) |= 0xfu << 20; /* CPACR: floating point */
    __asm volatile("dsb\n isb" ::: "memory");
    start();
}

__attribute__((section(".vectors"), used)) static const uintptr_t VECTORS[16 + 82] = {
    [0] = (uintptr_t)_stack_top,
    [1] = (uintptr_t)reset_handler,
    [2] = (uintptr_t)fault_handler, /* NMI */
    [3] = (uintptr_t)fault_handler,
    [4] = (uintptr_t)fault_handler,
    [5] = (uintptr_t)fault_handler,
    [6] = (uintptr_t)fault_handler,
    [15] = (uintptr_t)systick_handler,
    [16 + 28] = (uintptr_t)tim2_handler,
    [16 + 37] = (uintptr_t)usart1_handler,
};
