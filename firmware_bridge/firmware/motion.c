/* Motions as steps in time, followed by every axis within its limits of range, speed, acceleration and on-time. */
#define DICTIONARY_TABLES
#include "motion.h"

#include <math.h>
#include <string.h>

static const float STEP_S = 0.001f;

void motion_init(struct motion *motion) {
    memset(motion, 0, sizeof *motion);
    for (uint8_t i = 0; i < AXIS_COUNT; i++) {
        motion->axis[i].hold = motion->axis[i].position = AXES[i].rest;
        motion_limit(motion, i, AXES[i].low, AXES[i].high, AXES[i].rest, AXES[i].speed);
    }
    motion->changed = true;
}

static float clamp(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

void motion_limit(struct motion *motion, uint8_t axis, int32_t low, int32_t high, int32_t rest, int32_t speed) {
    const struct axis *widest = &AXES[axis];
    motion->limit[axis].low = clamp(low, widest->low, widest->high);
    motion->limit[axis].high = clamp(high, motion->limit[axis].low, widest->high);
    motion->limit[axis].rest = clamp(rest, motion->limit[axis].low, motion->limit[axis].high);
    motion->limit[axis].speed = clamp(speed, 0, widest->speed);
}

static uint32_t axes_of(uint8_t which) {
    uint32_t axes = 0;
    for (int i = MOTION_START[which]; i < MOTION_START[which + 1]; i++)
        axes |= 1u << STEPS[i].axis;
    return axes;
}

void motion_start(struct motion *motion, uint8_t which) {
    const uint32_t axes = axes_of(which);
    int slot = 0;
    for (int i = 0; i < RUNS_MAX; i++) {
        if (motion->run[i].active && axes_of(motion->run[i].motion) & axes)
            motion->run[i].active = false;
        if (!motion->run[i].active)
            slot = i; /* there are fewer sets of axes than runs: one is always free */
    }
    for (int i = 0; i < AXIS_COUNT; i++)
        if (axes >> i & 1)
            motion->axis[i].sway = 0;
    motion->run[slot].active = true;
    motion->run[slot].motion = which;
    motion->run[slot].next = MOTION_START[which];
    motion->run[slot].age_ms = 0;
}

void motion_rest(struct motion *motion) {
    for (int i = 0; i < RUNS_MAX; i++)
        motion->run[i].active = false;
    for (int i = 0; i < AXIS_COUNT; i++) {
        motion->axis[i].hold = motion->limit[i].rest;
        motion->axis[i].sway = 0;
    }
}

void motion_hold(struct motion *motion, uint8_t axis, int16_t value) { motion->axis[axis].hold = value; }

static void advance_runs(struct motion *motion) {
    for (int i = 0; i < RUNS_MAX; i++) {
        if (!motion->run[i].active)
            continue;
        const uint8_t end = MOTION_START[motion->run[i].motion + 1];
        while (motion->run[i].next < end && STEPS[motion->run[i].next].at_ms <= motion->run[i].age_ms) {
            const struct step *step = &STEPS[motion->run[i].next++];
            if (step->sway)
                motion->axis[step->axis].sway = step->value;
            else
                motion->axis[step->axis].hold = step->value;
        }
        motion->run[i].age_ms++;
        motion->run[i].active = motion->run[i].next < end;
    }
}

static uint32_t advance_axis(struct motion *motion, int i) {
    const float low = motion->limit[i].low, high = motion->limit[i].high, rest = motion->limit[i].rest;
    const float target = clamp(motion->axis[i].hold + motion->axis[i].sway, low, high);
    const float distance = target - motion->axis[i].position, reach = AXES[i].acceleration * STEP_S;
    if (fabsf(distance) <= reach * STEP_S && fabsf(motion->axis[i].speed) <= 2 * reach) {
        motion->changed = motion->changed || distance != 0;
        motion->axis[i].position = target;
        motion->axis[i].speed = 0;
    } else {
        /* As fast as it can still brake from; the term under the root allows for braking that begins one step late. */
        const float brake = sqrtf(2 * AXES[i].acceleration * fabsf(distance) + reach * reach / 4) - reach / 2;
        const float wanted = clamp(brake, 0, motion->limit[i].speed) * (distance < 0 ? -1.0f : 1.0f);
        motion->axis[i].speed = clamp(wanted, motion->axis[i].speed - reach, motion->axis[i].speed + reach);
        /* Never further out than the ends; one that is, as they were narrowed just now, comes back and does not jump. */
        const float at = motion->axis[i].position, next = at + motion->axis[i].speed * STEP_S;
        motion->axis[i].position = clamp(next, at < low ? at : low, at > high ? at : high);
        motion->changed = true;
    }
    motion->axis[i].on_ms = target == rest ? 0 : motion->axis[i].on_ms + 1;
    if (motion->axis[i].on_ms <= (uint32_t)AXES[i].on_max_s * 1000u)
        return 0;
    motion->axis[i].hold = rest;
    motion->axis[i].sway = 0;
    return 1;
}

uint32_t motion_step(struct motion *motion) {
    uint32_t cuts = 0;
    advance_runs(motion);
    for (int i = 0; i < AXIS_COUNT; i++)
        cuts += advance_axis(motion, i);
    return cuts;
}
