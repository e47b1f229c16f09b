// What a kernel's source needs of CUDA, on a CPU: stands before the source when it is compiled by a C++
// compiler. Blocks run one after the other; the threads of a block are fibers, which take turns at its
// barriers and nowhere else. Where the first block has none, the other blocks' threads are plain calls. Warps
// run one after the other from one barrier of the block to the next.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <setjmp.h>
#include <tuple>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define DDPM_HALF_CONVERSIONS
#define DDPM_TENSOR_CORES

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
static inline unsigned short float_to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

namespace stand_in {

// The operands that a thread shows the others of its warp, in an operation of the whole warp.
struct Shown {
    // Of the first factor, and of the second.
    float a[8], b[4];
    const char *row;
};

struct Copy {
    void *to;
    const void *from;
};

struct Fiber {
    // To begin it; to go on. `swapcontext` would ask the system for signal masks each time.
    ucontext_t begin;
    jmp_buf on;
    std::vector<char> stack;
    dim3 thread;
    bool begun = false, done = true, at_barrier = false;
    // True if the barrier is one of its warp only.
    bool with_warp = false;
    // What it waits with: the value that it shows the others of its warp.
    float shown = 0;
    // Used alternately: the thread may begin the next operation while others still read its operands of this one.
    Shown operands[2];
    unsigned operation = 0;
    // Copies to shared memory that the thread has begun.
    std::vector<Copy> copies;
};

static std::vector<std::unique_ptr<Fiber>> fibers;
static jmp_buf scheduler;
static Fiber *current;
static const std::function<void()> *body;
static bool waited;

static void enter() {
    (*body)();
    current->done = true;
    _longjmp(scheduler, 1);
}

static void wait(bool with_warp) {
    Fiber *own = current;
    if (!own) abort(); // No barrier in the first block, but in this one.
    waited = own->at_barrier = true;
    own->with_warp = with_warp;
    if (!_setjmp(own->on)) _longjmp(scheduler, 1);
}

static void run_block_without_barriers(const std::function<void()> &kernel) {
    current = nullptr;
    for (threadIdx.z = 0; threadIdx.z < blockDim.z; ++threadIdx.z)
        for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel();
}

static void run_block(const std::function<void()> &kernel) {
    size_t count = (size_t)blockDim.x * blockDim.y * blockDim.z;
    body = &kernel;
    while (fibers.size() < count) {
        fibers.emplace_back(new Fiber);
        fibers.back()->stack.resize(64 << 10);
    }
    for (size_t i = 0; i < count; ++i) {
        Fiber &fiber = *fibers[i];
        if (!fiber.begun) {
            getcontext(&fiber.begin);
            fiber.begin.uc_stack.ss_sp = fiber.stack.data();
            fiber.begin.uc_stack.ss_size = fiber.stack.size();
            fiber.begin.uc_link = nullptr;
            makecontext(&fiber.begin, enter, 0);
            fiber.begun = true;
        }
        fiber.thread = {(unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y),
                        (unsigned)(i / blockDim.x / blockDim.y)};
        fiber.done = false;
        fiber.at_barrier = false;
        fiber.operation = 0;
        fiber.copies.clear();
    }
    // In turn, so that all come to a barrier before one leaves it.
    for (bool left = true; left;) {
        left = false;
        for (size_t warp = 0; warp < count; warp += 32) {
            for (bool within = true; within;) {
                within = false;
                for (size_t i = warp; i < count && i < warp + 32; ++i) {
                    if (fibers[i]->done) continue;
                    current = fibers[i].get();
                    threadIdx = current->thread;
                    if (!_setjmp(scheduler)) {
                        if (current->at_barrier) _longjmp(current->on, 1);
                        setcontext(&current->begin);
                    }
                    if (fibers[i]->done) continue;
                    if (fibers[i]->with_warp) within = true;
                    else left = true;
                }
            }
        }
    }
}

// The thread's number in its block.
static unsigned own_number() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

// Returns the operands that a thread of the warp shows, after all threads have called `show`.
template <class F> static auto shown_by_warp(F show) {
    unsigned at = current->operation++ % 2, warp = own_number() / 32 * 32;
    show(current->operands[at]);
    wait(true);
    return [=](unsigned lane) -> const Shown & { return fibers[warp + lane]->operands[at]; };
}

template <class... A, size_t... I>
std::function<void()> with_arguments(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    auto values = std::make_tuple(*(std::decay_t<A> *)arguments[I]...);
    return [=] { std::apply(kernel, values); };
}

template <class... A> std::function<void()> *keep(void (*kernel)(A...), void **arguments) {
    return new std::function<void()>(with_arguments(kernel, arguments, std::index_sequence_for<A...>()));
}

} // namespace stand_in

static inline void __syncthreads() { stand_in::wait(false); }

// All threads of the warp must call this.
static inline float __shfl_xor_sync(unsigned, float value, int other) {
    stand_in::current->shown = value;
    stand_in::wait(true);
    float found = stand_in::fibers[stand_in::own_number() ^ other]->shown;
    stand_in::wait(true);
    return found;
}

// Memory of the launch's size that the threads of a block share: up to what a block has on each device of compute
// capability 8.0 and later.
static const unsigned DYNAMIC_SHARED = 99 << 10;
alignas(128) static unsigned char dynamic_shared[DYNAMIC_SHARED + 16];

// The values arrive when the thread waits for them, and not before.
static inline void copy_16(void *to, const void *from, bool there) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) abort();
    memset(to, 0xff, 16);
    stand_in::current->copies.push_back({to, there ? from : nullptr});
}
static inline void wait_for_copies() {
    for (auto &copy : stand_in::current->copies) {
        if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    stand_in::current->copies.clear();
}

// Values of the type of maps that selects the tensor cores' instructions.
static inline float factor_to_float(unsigned short bits) {
#if defined(DDPM_BF16)
    return __uint_as_float((unsigned)bits << 16);
#else
    return half_to_float(bits);
#endif
}
static inline unsigned short float_to_factor(float value) {
#if defined(DDPM_BF16)
    unsigned bits = __float_as_uint(value);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return nan ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#else
    return float_to_half(value);
#endif
}
static inline unsigned pair(float first, float second) {
    return float_to_factor(first) | (unsigned)float_to_factor(second) << 16;
}

// ldmatrix.m8n8.x4: the registers of the PTX ISA.
static inline void load_matrices(unsigned (&to)[4], const void *row) {
    if ((uintptr_t)row % 16) abort();
    auto of = stand_in::shown_by_warp([=](stand_in::Shown &own) { own.row = (const char *)row; });
    unsigned lane = stand_in::own_number() % 32;
    for (unsigned i = 0; i < 4; ++i) memcpy(&to[i], of(8 * i + lane / 4).row + lane % 4 * 4, 4);
}
// ldmatrix.m8n8.x4.trans.
static inline void load_transposed(unsigned (&to)[4], const void *row) {
    if ((uintptr_t)row % 16) abort();
    auto of = stand_in::shown_by_warp([=](stand_in::Shown &own) { own.row = (const char *)row; });
    unsigned lane = stand_in::own_number() % 32;
    for (unsigned i = 0; i < 4; ++i) {
        unsigned short values[2];
        for (unsigned j = 0; j < 2; ++j) memcpy(&values[j], of(8 * i + lane % 4 * 2 + j).row + lane / 4 * 2, 2);
        to[i] = values[0] | (unsigned)values[1] << 16;
    }
}
// mma.m16n8k16.row.col with sums in f32. Of the first factor, thread t has in register i the values of row
// t / 4 + 8 (i % 2), columns 2 (t % 4) + 8 (i / 2) and the next; of the second, in register i, those of column t / 4,
// rows 2 (t % 4) + 8 i and the next; of the sum, in value i, that of row t / 4 + 8 (i / 2), column 2 (t % 4) + i % 2.
static inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    auto of = stand_in::shown_by_warp([&](stand_in::Shown &own) {
        for (unsigned i = 0; i < 8; ++i) own.a[i] = factor_to_float(a[i / 2] >> i % 2 * 16);
        for (unsigned i = 0; i < 4; ++i) own.b[i] = factor_to_float((i < 2 ? b0 : b1) >> i % 2 * 16);
    });
    unsigned lane = stand_in::own_number() % 32;
    for (unsigned i = 0; i < 4; ++i) {
        unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            unsigned of_a = row / 8 * 2 + k / 8 * 4 + k % 2, of_b = k / 8 * 2 + k % 2;
            sum[i] += of(row % 8 * 4 + k % 8 / 2).a[of_a] * of(column * 4 + k % 8 / 2).b[of_b];
        }
    }
}

// Copies a launch's arguments; runs it.
#define STAND_IN_KERNEL(name)                                                                              \
    extern "C" void *name##__bind(void **arguments) { return stand_in::keep(name, arguments); }
extern "C" void stand_in_run(void *bound, const unsigned *grid, const unsigned *block, unsigned shared) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                // Shared memory that a block reads before it writes it is NaN.
                if (shared) memset(dynamic_shared, 0xff, sizeof dynamic_shared);
                bool first = !x && !y && !z;
                if (first) stand_in::waited = false;
                auto run = first || stand_in::waited ? stand_in::run_block : stand_in::run_block_without_barriers;
                run(*(std::function<void()> *)bound);
                // Nothing may be written behind it.
                for (unsigned i = shared; shared && i < sizeof dynamic_shared; ++i)
                    if (dynamic_shared[i] != 0xff) abort();
            }
}
