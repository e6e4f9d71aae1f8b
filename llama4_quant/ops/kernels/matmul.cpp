// Products of bf16 activations with weights as they are stored: int4, FP8, int8, bf16. See task.h for what is computed
// and docs/kernels-cpu.md for layouts. Callers check shapes and dtypes; addresses need no alignment.

#include "fast.h"
#include "portable.h"

#ifdef LLAMA4_QUANT_FAST
namespace variant = fast;
#else
namespace portable {
INLINE const char* instructions() { return kInstructions; }
}  // namespace portable
namespace variant = portable;
#endif

extern "C" const char* llama4_quant_instructions() { return variant::instructions(); }

// 0: done; 1: out of memory; 2: the experts' rows do not sum to all rows.
extern "C" int32_t llama4_quant_matmul(const Task* task) {
    int64_t rows = 0;
    for (int64_t expert = 0; expert < task->experts; expert++) {
        if (task->counts[expert] < 0) return 2;
        rows += task->counts[expert];
    }
    if (rows != task->rows) return 2;
    if (!task->rows || !task->outputs) return 0;
    return variant::run(*task);
}
