// Calls of compiled kernels one after another, without Python in between; and the routing of one token, which is what
// a decoding step does there beside products and elementwise work.

#include <cmath>

#include "task.h"

// Fields as in native_tape.py.
struct Command {
    int32_t (*function)(const void* task);  // 0: done
    const void* task;
};

struct RouteTask {
    const uint16_t* logits;  // bf16 [experts]
    const uint16_t* x;       // bf16 [size]
    int64_t* counts;         // [experts]: 1 for the expert with the largest logit, the first of equals, and 0 for others
    uint16_t* y;             // bf16 [size]: x times sigmoid(largest), a score that is rounded to bf16
    int64_t experts, size;
};

// The first status that is not 0.
extern "C" int32_t llama4_quant_run(const Command* commands, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const int32_t status = commands[i].function(commands[i].task);
        if (status) return status;
    }
    return 0;
}

extern "C" int32_t llama4_quant_route(const RouteTask* task) {
    int64_t chosen = 0;
    float most = from_bf16(task->logits[0]);
    for (int64_t expert = 1; expert < task->experts; expert++) {
        const float logit = from_bf16(task->logits[expert]);
        if (logit > most || (logit != logit && most == most)) chosen = expert, most = logit;  // NaN counts as largest
    }
    for (int64_t expert = 0; expert < task->experts; expert++) task->counts[expert] = expert == chosen;
    const float score = from_bf16(to_bf16(1.0f / (1.0f + std::exp(-most))));
    for (int64_t i = 0; i < task->size; i++) task->y[i] = to_bf16(from_bf16(task->x[i]) * score);
    return 0;
}
