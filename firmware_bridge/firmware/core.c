/* The protocol's session and what its commands do: PROTOCOL.md, from "Session" on. */
#define DICTIONARY_MESSAGES
#include "core.h"

#include <string.h>

#include "dictionary.h"
#include "frame.h"
#include "motion.h"

enum { TX_BYTES = 1024, QUIET_US = 20000, STEP_US = 1000, STEPS_MAX = 100, HOUR_US = 3600000000u, AMBER_US = 1000000 };

#define REQUIRE(condition) do { if (!(condition)) board_fail(RESET_ASSERTION); } while (0)

struct waiting {
    bool waits;
    uint8_t motion;
    uint16_t id;
    uint64_t at, deadline;
};

static struct {
    uint64_t now;         /* µs; begins at 2^32, so that what lies before the start can be written too */
    uint64_t stepped;     /* motion has come so far */
    uint64_t heard, byte_came, amplifier_set;
    bool host_seen, amplifier, settled;
    uint8_t expected;     /* sequence of the next frame */
    uint8_t state, cause, reset;
    bool answered;        /* something went out since the frame came in: it carries the acknowledgement */
    int reboot;
    struct waiting act[ACTS_MAX];
    struct { uint16_t id; uint8_t result; uint32_t at; } result[RESULTS_MAX];
    uint8_t result_next, results;
    int32_t setting[SETTING_COUNT];
    uint32_t settings_crc;
    int16_t trim_ppm;
    int32_t trim_rest;    /* millionths of a µs that no period has had yet */
    uint32_t tick;
    uint64_t pose_sent, inputs_sent;
    struct inputs inputs;
    uint64_t board_reset_until, board_deaf_until, board_resets[BOARD_RESETS_MAX];
    struct decoder decoder;
    struct motion motion;
    struct health health;
    struct outputs outputs;
    uint16_t tx_first, tx_count;
    uint8_t tx[TX_BYTES];
} core;

/* --- sending --- */

static void send(const void *payload, uint8_t size) {
    uint8_t frame[FRAME_MAX];
    const uint8_t bytes = frame_encode(frame, core.expected, payload, size);
    core.answered = true;
    if (core.tx_count + bytes > TX_BYTES) {
        core.health.tx_dropped++;
        return;
    }
    for (int i = 0; i < bytes; i++)
        core.tx[(core.tx_first + core.tx_count++) % TX_BYTES] = frame[i];
}

#define SEND(type, ...) do { const struct type message = {__VA_ARGS__}; send(&message, sizeof message); } while (0)

bool core_transmit(uint8_t *byte) {
    if (core.tx_count == 0)
        return false;
    *byte = core.tx[core.tx_first];
    core.tx_first = (uint16_t)((core.tx_first + 1) % TX_BYTES);
    core.tx_count--;
    return true;
}

static void send_state(void) {
    SEND(state, MESSAGE_STATE, (uint32_t)core.now, core.state, core.cause);
}

static void send_identity(uint16_t offset) {
    struct identity message = {MESSAGE_IDENTITY, offset, PACKED_BYTES, DICTIONARY_HASH, BUILD_NUMBER, core.settings_crc,
                               core.reset, WINDOW, {0}};
    uint16_t size = 0;
    if (offset < PACKED_BYTES) {
        size = (uint16_t)(PACKED_BYTES - offset);
        if (size > sizeof message.data)
            size = sizeof message.data;
        memcpy(message.data, PACKED + offset, size);
    }
    send(&message, (uint8_t)(sizeof message - sizeof message.data + size));
}

static void send_pose(void) {
    int16_t at[AXIS_COUNT];
    for (int i = 0; i < AXIS_COUNT; i++)
        at[i] = (int16_t)core.motion.axis[i].position;
    SEND(pose, MESSAGE_POSE, (uint32_t)core.now, at[0], at[1], at[2], at[3], at[4]);
    core.pose_sent = core.now;
    core.motion.changed = false;
}

static void send_inputs(void) {
    core.inputs.which = MESSAGE_INPUTS;
    core.inputs.at = (uint32_t)core.now;
    send(&core.inputs, sizeof core.inputs);
    core.inputs_sent = core.now;
}

static void send_health(void) {
    core.health.which = MESSAGE_HEALTH;
    core.health.frames = core.decoder.frames;
    core.health.bad_bytes = core.decoder.bad_bytes;
    core.health.crc_errors = core.decoder.crc_errors;
    send(&core.health, sizeof core.health);
}

/* --- acts --- */

static void report_act(uint16_t id, uint8_t result) {
    core.result[core.result_next].id = id;
    core.result[core.result_next].result = result;
    core.result[core.result_next].at = (uint32_t)core.now;
    core.result_next = (uint8_t)((core.result_next + 1) % RESULTS_MAX);
    if (core.results < RESULTS_MAX)
        core.results++;
    if (result == RESULT_STARTED)
        core.health.acts_started++;
    else if (result == RESULT_STALE)
        core.health.acts_stale++;
    else
        core.health.acts_refused++;
    SEND(acted, MESSAGE_ACTED, id, result, (uint32_t)core.now);
}

/* The full time of one that the wire carries modulo 2^32: the one nearest to now. */
static uint64_t full_time(uint32_t at) { return core.now + (uint64_t)(int64_t)(int32_t)(at - (uint32_t)core.now); }

static void take_act(const struct waiting *act) {
    if (core.state != STATE_ARMED) {
        report_act(act->id, RESULT_REFUSED);
    } else if (act->motion >= MOTION_COUNT) {
        report_act(act->id, RESULT_UNKNOWN);
    } else if (core.now > act->deadline) {
        report_act(act->id, RESULT_STALE);
    } else if (act->at > core.now + AHEAD_US) {
        report_act(act->id, RESULT_EARLY);
    } else {
        for (int i = 0; i < ACTS_MAX; i++)
            if (!core.act[i].waits) {
                core.act[i] = *act;
                return;
            }
        report_act(act->id, RESULT_FULL);
    }
}

static void answer_act(uint16_t id) {
    for (int i = 0; i < ACTS_MAX; i++)
        if (core.act[i].waits && core.act[i].id == id) {
            SEND(acted, MESSAGE_ACTED, id, RESULT_PENDING, (uint32_t)core.act[i].at);
            return;
        }
    for (int i = 1; i <= core.results; i++) { /* the newest first: ids come round */
        const int at = (core.result_next + RESULTS_MAX - i) % RESULTS_MAX;
        if (core.result[at].id == id) {
            SEND(acted, MESSAGE_ACTED, id, core.result[at].result, core.result[at].at);
            return;
        }
    }
    SEND(acted, MESSAGE_ACTED, id, RESULT_UNKNOWN, (uint32_t)core.now);
}

static void run_acts(void) {
    for (;;) {
        struct waiting *next = 0;
        for (int i = 0; i < ACTS_MAX; i++) {
            struct waiting *act = &core.act[i];
            if (act->waits && act->at <= core.now && (!next || act->at < next->at))
                next = act;
        }
        if (!next)
            return;
        next->waits = false;
        if (core.now > next->deadline) {
            report_act(next->id, RESULT_STALE);
        } else {
            REQUIRE(core.state == STATE_ARMED);
            motion_start(&core.motion, next->motion);
            report_act(next->id, RESULT_STARTED);
        }
    }
}

/* --- states --- */

static void amplify(bool on) {
    core.amplifier = on;
    core.amplifier_set = core.now;
}

static void enter(uint8_t state, uint8_t cause) {
    core.state = state;
    core.cause = cause;
    amplify(state == STATE_ARMED);
    if (state == STATE_ARMED) {
        core.heard = core.now;
    } else {
        for (int i = 0; i < ACTS_MAX; i++)
            if (core.act[i].waits) {
                core.act[i].waits = false;
                report_act(core.act[i].id, RESULT_REFUSED);
            }
    }
    motion_rest(&core.motion);
    send_state();
}

static void watch_heartbeat(void) {
    if (core.state == STATE_ARMED && core.now - core.heard > HEARTBEAT_US)
        enter(STATE_SAFE, CAUSE_HEARTBEAT);
    if (core.state == STATE_SAFE) { /* amber, up and down once in two seconds */
        const bool lit = core.now / AMBER_US % 2 == 0;
        motion_hold(&core.motion, AXIS_RED, lit ? 1000 : 100);
        motion_hold(&core.motion, AXIS_GREEN, lit ? 400 : 40);
    }
}

static void watch_board(void) {
    core.outputs.board_reset = core.now < core.board_reset_until;
    if (!core.host_seen || !core.setting[SETTING_BOARD_RESET] || core.now - core.heard <= BOARD_RESET_US || core.now < core.board_deaf_until)
        return;
    uint64_t *oldest = &core.board_resets[core.health.board_resets % BOARD_RESETS_MAX];
    if (*oldest && core.now - *oldest < HOUR_US)
        return;
    *oldest = core.now;
    core.health.board_resets++;
    core.board_reset_until = core.now + BOARD_PULSE_US;
    core.board_deaf_until = core.now + BOARD_BOOT_US;
}

static void hear(uint32_t at) {
    const uint64_t time = full_time(at);
    if (time + HEARTBEAT_US < core.now) {
        core.health.heartbeats_stale++;
        return;
    }
    core.health.heartbeats++;
    core.host_seen = true;
    const uint64_t heard = time < core.now ? time : core.now; /* the host's idea of our time may be a little ahead */
    if (heard > core.heard)
        core.heard = heard;
}

/* --- settings --- */

static void renew_settings_crc(void) {
    uint32_t crc = 0xffffffff; /* CRC-32 as in zlib */
    const uint8_t *bytes = (const uint8_t *)core.setting;
    for (unsigned i = 0; i < sizeof core.setting; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    core.settings_crc = ~crc;
}

static void limit_servo(uint8_t axis, const int32_t *first) { motion_limit(&core.motion, axis, first[0], first[1], first[2], first[3]); }

static bool set(uint8_t which, int32_t value) {
    if (core.state == STATE_ARMED || which >= SETTING_COUNT || value < SETTINGS[which].low || value > SETTINGS[which].high)
        return false;
    core.setting[which] = value;
    renew_settings_crc();
    limit_servo(AXIS_PAN, core.setting + SETTING_PAN_LOW); /* low, high, rest and speed follow each other */
    limit_servo(AXIS_TILT, core.setting + SETTING_TILT_LOW);
    motion_rest(&core.motion); /* rest may be elsewhere now */
    return true;
}

/* --- commands --- */

static bool trim(int16_t ppm) {
    if (ppm < -TRIM_PPM_MAX || ppm > TRIM_PPM_MAX)
        return false;
    core.trim_ppm = ppm;
    return true;
}

static bool reboot(uint8_t how) {
    if (core.state == STATE_ARMED || how >= REBOOT_COUNT)
        return false;
    core.reboot = how;
    return true;
}

#define AS(type) ((const struct type *)frame->payload)

static bool obey(const struct frame *frame) {
    if (frame->payload[0] >= MESSAGE_COUNT || frame->size != COMMAND_BYTES[frame->payload[0]])
        return false;
    switch (frame->payload[0]) {
    case MESSAGE_IDENTIFY: send_identity(AS(identify)->offset); return true;
    case MESSAGE_GET_CLOCK: SEND(clock, MESSAGE_CLOCK, AS(get_clock)->token, (uint32_t)core.now); return true;
    case MESSAGE_SET: return set(AS(set)->setting, AS(set)->value);
    case MESSAGE_GET_SETTINGS: SEND(settings, MESSAGE_SETTINGS, core.settings_crc); return true;
    case MESSAGE_ARM: enter(STATE_ARMED, CAUSE_COMMAND); return true;
    case MESSAGE_DISARM: enter(STATE_WAITING, CAUSE_COMMAND); return true;
    case MESSAGE_GET_STATE: send_state(); return true;
    case MESSAGE_HEARTBEAT: hear(AS(heartbeat)->at); return true;
    case MESSAGE_ACT: {
        const struct waiting act = {true, AS(act)->motion, AS(act)->id, full_time(AS(act)->at), full_time(AS(act)->deadline)};
        take_act(&act);
        return true;
    }
    case MESSAGE_ASK_ACT: answer_act(AS(ask_act)->id); return true;
    case MESSAGE_AMPLIFIER: amplify(AS(amplifier)->on && core.state == STATE_ARMED); return true;
    case MESSAGE_TRIM: return trim(AS(trim)->ppm);
    case MESSAGE_GET_HEALTH: send_health(); return true;
    case MESSAGE_REBOOT: return reboot(AS(reboot)->how);
    default: return false;
    }
}

static void take_frame(const struct frame *frame) {
    core.answered = false;
    const int behind = (core.expected + SEQUENCES - frame->sequence) % SEQUENCES;
    if (behind > 0) {
        core.health.out_of_order++;
        /* Taken before: an empty frame would be read as a refusal of what came after it, and each repetition would breed the next. */
        if (behind <= WINDOW)
            send_state();
    } else {
        core.expected = (uint8_t)((core.expected + 1) % SEQUENCES);
        if (frame->size && !obey(frame))
            SEND(refused, MESSAGE_REFUSED, frame->payload[0]);
    }
    if (!core.answered)
        send(0, 0);
}

static void take_frames(void) {
    struct frame frame;
    while (decoder_next(&core.decoder, &frame))
        take_frame(&frame);
}

/* --- what the board calls --- */

static void advance_to(uint32_t now_us) { core.now += now_us - (uint32_t)core.now; }

void core_init(uint32_t now_us, uint8_t reset) {
    memset(&core, 0, sizeof core);
    core.now = core.stepped = core.heard = (UINT64_C(1) << 32) + now_us;
    core.reset = reset;
    core.reboot = -1;
    for (int i = 0; i < SETTING_COUNT; i++)
        core.setting[i] = SETTINGS[i].initial;
    renew_settings_crc();
    motion_init(&core.motion);
    send_state(); /* WAITING, CAUSE_RESET: what zero stands for */
}

void core_receive(uint8_t byte, uint32_t now_us) {
    advance_to(now_us);
    core.byte_came = core.now;
    decoder_put(&core.decoder, byte);
    take_frames();
}

static uint16_t servo_us(int axis, int zero, int per_90) {
    return (uint16_t)(core.setting[zero] + (int32_t)(core.motion.axis[axis].position * core.setting[per_90] / 9000));
}

static void renew_outputs(void) {
    if (core.amplifier && core.now - core.amplifier_set > AMPLIFIER_US) {
        core.amplifier = false;
        core.health.on_time_cuts++;
    }
    core.outputs.servo_us[0] = servo_us(AXIS_PAN, SETTING_PAN_ZERO_US, SETTING_PAN_US_PER_90);
    core.outputs.servo_us[1] = servo_us(AXIS_TILT, SETTING_TILT_ZERO_US, SETTING_TILT_US_PER_90);
    for (int i = 0; i < 3; i++)
        core.outputs.light_permille[i] = (uint16_t)core.motion.axis[AXIS_RED + i].position;
    core.outputs.amplifier = core.amplifier;
}

void core_step(uint32_t now_us) {
    advance_to(now_us);
    while (core.decoder.have && core.now - core.byte_came > QUIET_US) {
        decoder_give_up(&core.decoder);
        take_frames();
    }
    watch_heartbeat();
    watch_board();
    run_acts();
    if (core.now - core.stepped > STEPS_MAX * STEP_US) /* after a stall it goes on from where it is; it does not jump */
        core.stepped = core.now - STEPS_MAX * STEP_US;
    while (core.now - core.stepped >= STEP_US) {
        core.stepped += STEP_US;
        core.health.on_time_cuts += motion_step(&core.motion);
    }
    renew_outputs();
    if (core.motion.changed && core.now - core.pose_sent >= PACE_US)
        send_pose();
    if (core.settled && core.now - core.inputs_sent >= REPORT_US)
        send_inputs();
}

uint32_t core_edge(uint32_t at_us) {
    SEND(tick, MESSAGE_TICK, core.tick++, at_us);
    core.trim_rest += TICK_US * (int32_t)core.trim_ppm; /* millionths of a µs: the remainder is carried, so that nothing drifts */
    const int32_t whole = core.trim_rest / 1000000;
    core.trim_rest -= whole * 1000000;
    return (uint32_t)(TICK_US + whole);
}

void core_inputs(uint8_t flags, uint16_t battery_pin_mv, int16_t temperature_a, int16_t temperature_b) {
    const bool changed = !core.settled || flags != core.inputs.flags;
    core.settled = true;
    core.inputs.flags = flags;
    core.inputs.battery_mv = (uint16_t)((uint32_t)battery_pin_mv * (uint32_t)core.setting[SETTING_BATTERY_MILLI] / 1000);
    core.inputs.temperature_a = temperature_a;
    core.inputs.temperature_b = temperature_b;
    if (changed)
        send_inputs();
}

void core_rx_dropped(void) { core.health.rx_dropped++; }

const struct outputs *core_outputs(void) { return &core.outputs; }

int core_reboot(void) {
    const int how = core.tx_count ? -1 : core.reboot; /* the answer goes out first */
    if (how >= 0)
        core.reboot = -1;
    return how;
}
