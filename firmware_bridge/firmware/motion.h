/* Curves: what the outputs that move are to do, within their limits. Hardware-free. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "dictionary.h"

enum { RUNS_MAX = 4 };

struct motion {
    struct {
        float hold, sway;        /* where it shall be: their sum */
        float position, speed;   /* where it is, per second */
        uint32_t on_ms;          /* away from rest */
    } axis[AXIS_COUNT];
    struct {
        bool active;
        uint8_t motion, next; /* the next step, as an index of STEPS */
        uint32_t age_ms;
    } run[RUNS_MAX];
    struct { float low, high, rest, speed; } limit[AXIS_COUNT]; /* the body's own, within those of the dictionary */
    bool changed; /* since the caller last cleared it */
};

void motion_init(struct motion *motion);
/* Narrows an axis to what this body can do. */
void motion_limit(struct motion *motion, uint8_t axis, int32_t low, int32_t high, int32_t rest, int32_t speed);
/* Begins a motion; it takes over the axes that it moves from those under way. */
void motion_start(struct motion *motion, uint8_t which);
/* Ends all motions and lets every axis go to rest. */
void motion_rest(struct motion *motion);
/* Where an axis shall be held, outside of any motion. */
void motion_hold(struct motion *motion, uint8_t axis, int16_t value);
/* One millisecond passes; returns how many axes were put to rest because they were on too long. */
uint32_t motion_step(struct motion *motion);
