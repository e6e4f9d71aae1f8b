// Calls of compiled kernels one after another, without Python in between; and the routing of one token, which is what
// a decoding step does there beside products and elementwise work.

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "task.h"

// Fields as in native_tape.py.
struct Command {
    int32_t (*function)(const void* task);  // 0: done
    const void* task;
};

struct RouteTask {
    const uint16_t* logits;  // bf16 [experts]
    const uint16_t* x;       // bf16 [size]
    int64_t* counts;         // [experts]: 1 for the expert with the largest logit, and 0 for others
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

namespace {

struct Logit {
    float value;
    int64_t expert;
};

// NaN counts as the largest.
INLINE bool is_larger(const Logit& a, const Logit& b) {
    return (a.value != a.value && b.value == b.value) || a.value > b.value;
}

}  // namespace

// 0: done; 1: out of memory. Of equal logits, which are no rarity in bf16, the one that torch's `topk` takes counts: its
// algorithm on processors is the standard library's, this one for less than 64 numbers and that one for more.
extern "C" int32_t llama4_quant_route(const RouteTask* task) {
    const std::unique_ptr<Logit[]> logits(new (std::nothrow) Logit[task->experts]);
    if (!logits) return 1;
    Logit *first = logits.get(), *last = first + task->experts;
    for (int64_t expert = 0; expert < task->experts; expert++) first[expert] = {from_bf16(task->logits[expert]), expert};
    if (task->experts < 64) std::nth_element(first, first, last, is_larger);
    else std::partial_sort(first, first + 1, last, is_larger);
    for (int64_t expert = 0; expert < task->experts; expert++) task->counts[expert] = expert == first->expert;
    const float score = from_bf16(to_bf16(1.0f / (1.0f + std::exp(-first->value))));
    for (int64_t i = 0; i < task->size; i++) task->y[i] = to_bf16(from_bf16(task->x[i]) * score);
    return 0;
}
