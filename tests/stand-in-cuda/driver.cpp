// A CUDA driver whose device is this CPU: memory is malloc's, each thread's stream runs what it is given at
// once, one at a time, and a graph is a list of what a thread gave while it captured. Modules come from the
// stand-in for NVRTC. What would wait for a device adds a letter to the file that STAND_IN_WAITS names. Each
// kernel that a thread launches or captures adds a line with its name to the file that STAND_IN_LAUNCHES names,
// each product or convolution of a library the line "library", and each launch of a graph the line "graph". At the
// end of the process, the file that STAND_IN_MEMORY names receives the largest number of bytes of the device that were
// allocated at a time, and then the blocks of that time: for each size a line with its bytes and the number of blocks.
// With STAND_IN_IDLE, kernels and libraries do nothing, so that the memory of large batches can be counted.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

typedef int Result;
typedef uint64_t Pointer;
enum { SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500 };

static std::mutex lock;
// Of this thread's stream; and the memory that belongs to the graph.
static thread_local std::vector<std::function<void()>> *capture;
static thread_local std::set<Pointer> captured_memory;

typedef std::vector<std::function<void()>> Graph;

static void launches(const char *what) {
    if (const char *path = getenv("STAND_IN_LAUNCHES")) {
        FILE *file = fopen(path, "a");
        fprintf(file, "%s\n", what);
        fclose(file);
    }
}

static const bool idle = getenv("STAND_IN_IDLE");

// Now, or when the graph that is captured is launched.
static Result submit(const std::function<void()> &work) {
    if (capture) {
        capture->push_back(work);
        return SUCCESS;
    }
    std::lock_guard<std::mutex> guard(lock);
    work();
    return SUCCESS;
}
// The same for the libraries.
API void stand_in_submit(const std::function<void()> *work) {
    launches("library");
    if (!idle) submit(*work);
}

static Result waits(char what) {
    if (const char *path = getenv("STAND_IN_WAITS")) {
        FILE *file = fopen(path, "a");
        fputc(what, file);
        fclose(file);
    }
    return capture ? 900 : SUCCESS;
}

API Result cuInit(unsigned) { return SUCCESS; }
API Result cuDeviceGetCount(int *n) { return *n = 1, SUCCESS; }
API Result cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal ? 101 : SUCCESS; }
API Result cuDeviceGetName(char *name, int length, int) {
    return snprintf(name, length, "stand-in"), SUCCESS;
}
API Result cuDeviceGetAttribute(int *value, int attribute, int) {
    // Compute capability 8.0, and memory pools; of the others, none is asked for.
    *value = attribute == 75 ? 8 : attribute == 115 ? 1 : 0;
    return SUCCESS;
}
API Result cuDevicePrimaryCtxRetain(void **context, int) { return *context = (void *)1, SUCCESS; }
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuCtxGetCurrent(void **context) { return *context = (void *)1, SUCCESS; }
API Result cuCtxSetCurrent(void *) { return SUCCESS; }
API Result cuCtxSynchronize() { return waits('c'); }
API Result cuDeviceGetDefaultMemPool(void **pool, int) { return *pool = (void *)64, SUCCESS; }
API Result cuMemPoolSetAttribute(void *, int attribute, void *) { return attribute == 4 ? SUCCESS : INVALID; }
API Result cuMemGetInfo_v2(size_t *available, size_t *total) {
    return *available = *total = (size_t)8 << 30, SUCCESS;
}

// The memory of the device that is allocated, and that was allocated at the maximum.
static struct Held {
    std::mutex lock;
    std::map<Pointer, size_t> blocks;
    std::map<size_t, size_t> at_most;
    size_t bytes = 0, most = 0;

    void add(Pointer pointer, size_t size) {
        std::lock_guard<std::mutex> guard(lock);
        blocks[pointer] = size;
        bytes += size;
    }
    void remove(Pointer pointer) {
        std::lock_guard<std::mutex> guard(lock);
        look();
        auto block = blocks.find(pointer);
        if (block == blocks.end()) return;
        bytes -= block->second;
        blocks.erase(block);
    }
    // Called before memory is freed, so that each maximum is recorded.
    void look() {
        if (bytes <= most) return;
        most = bytes;
        at_most.clear();
        for (auto &block : blocks) at_most[block.second]++;
    }
    ~Held() {
        const char *path = getenv("STAND_IN_MEMORY");
        FILE *file = path ? fopen(path, "w") : nullptr;
        if (!file) return;
        look();
        fprintf(file, "%zu\n", most);
        for (auto &block : at_most) fprintf(file, "%zu %zu\n", block.first, block.second);
        fclose(file);
    }
} held;

API Result cuMemAlloc_v2(Pointer *pointer, size_t size) {
    void *memory = aligned_alloc(256, (size + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    // Not zeros: what is read before it is written must show. These are NaN in each type.
    if (!idle) memset(memory, 0xff, size);
    *pointer = (Pointer)memory;
    held.add(*pointer, size);
    if (capture) captured_memory.insert(*pointer);
    return SUCCESS;
}
API Result cuMemAllocAsync(Pointer *pointer, size_t size, void *) { return cuMemAlloc_v2(pointer, size); }
// While a graph is captured only what was allocated in it can be freed, and stays for its launches.
API Result cuMemFreeAsync(Pointer pointer, void *) {
    if (capture) return captured_memory.count(pointer) ? SUCCESS : INVALID;
    if (captured_memory.count(pointer)) return SUCCESS;
    held.remove(pointer);
    free((void *)pointer);
    return SUCCESS;
}
API Result cuMemFree_v2(Pointer pointer) { return waits('f'), cuMemFreeAsync(pointer, nullptr); }

static std::mutex pinned_lock;
static std::set<const void *> pinned;

API Result cuMemHostAlloc(void **memory, size_t size, unsigned) {
    if (!(*memory = malloc(size))) return OUT_OF_MEMORY;
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.insert(*memory);
    return SUCCESS;
}
API Result cuMemFreeHost(void *memory) {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(memory);
    return free(memory), SUCCESS;
}
API Result cuMemsetD8Async(Pointer pointer, unsigned char value, size_t size, void *) {
    return submit([=] { memset((void *)pointer, value, size); });
}
API Result cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t size, void *) {
    bool waiting;
    {
        std::lock_guard<std::mutex> guard(pinned_lock);
        waiting = !pinned.count(from);
    }
    if (waiting) waits('u');
    return submit([=] { memcpy((void *)to, from, size); });
}
API Result cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t size, void *) {
    waits('d');
    return submit([=] { memcpy(to, (void *)from, size); });
}
API Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t size, void *) {
    return submit([=] { memmove((void *)to, (void *)from, size); });
}

API Result cuStreamCreate(void **stream, unsigned) { return *stream = (void *)16, SUCCESS; }
API Result cuStreamDestroy_v2(void *) { return SUCCESS; }
API Result cuStreamSynchronize(void *) { return waits('s'); }
API Result cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
API Result cuEventCreate(void **event, unsigned) { return *event = (void *)32, SUCCESS; }
API Result cuEventDestroy_v2(void *) { return SUCCESS; }
API Result cuEventRecord(void *, void *) { return SUCCESS; }
API Result cuEventSynchronize(void *) { return SUCCESS; }
API Result cuEventQuery(void *) { return SUCCESS; }
API Result cuEventElapsedTime_v2(float *ms, void *, void *) { return *ms = 0, SUCCESS; }

API Result cuStreamBeginCapture_v2(void *, int) { return capture = new Graph, SUCCESS; }
API Result cuStreamIsCapturing(void *, int *status) { return *status = capture ? 1 : 0, SUCCESS; }
API Result cuStreamEndCapture(void *, void **graph) {
    *graph = capture;
    capture = nullptr;
    return *graph ? SUCCESS : INVALID;
}
API Result cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long) {
    return *exec = new Graph(*(Graph *)graph), SUCCESS;
}
API Result cuGraphUpload(void *, void *) { return SUCCESS; }
API Result cuGraphLaunch(void *exec, void *) {
    launches("graph");
    std::lock_guard<std::mutex> guard(lock);
    for (auto &work : *(Graph *)exec) work();
    return SUCCESS;
}
API Result cuGraphExecDestroy(void *exec) { return delete (Graph *)exec, SUCCESS; }
API Result cuGraphDestroy(void *graph) { return delete (Graph *)graph, SUCCESS; }

struct Function {
    std::string name;
    void *(*bind)(void **);
    void (*run)(void *, const unsigned *, const unsigned *, unsigned);
    // Maximum number of bytes of shared memory of a launch.
    unsigned shared;
};

API Result cuModuleLoadData(void **module, const void *image) {
    // The stand-in for NVRTC leaves the path of a library; candle's kernels, compiled by the stand-in for
    // nvcc, are empty.
    std::string text((const char *)image);
    *module = text.rfind("stand-in:", 0) == 0 ? dlopen(text.c_str() + 9, RTLD_NOW) : nullptr;
    if (!text.empty() && !*module) fprintf(stderr, "stand-in-cuda: %s\n", dlerror());
    return text.empty() || *module ? SUCCESS : INVALID;
}
API Result cuModuleUnload(void *) { return SUCCESS; }
API Result cuModuleGetFunction(void **function, void *module, const char *name) {
    if (!module) {
        fprintf(stderr, "stand-in-cuda: %s is none of the crate's own kernels\n", name);
        return NOT_FOUND;
    }
    auto *found = new Function{name, nullptr, nullptr, 48 << 10};
    found->bind = (void *(*)(void **))dlsym(module, (std::string(name) + "__bind").c_str());
    found->run = (decltype(found->run))dlsym(module, "stand_in_run");
    *function = found;
    return found->bind && found->run ? SUCCESS : NOT_FOUND;
}
API Result cuFuncSetAttribute(void *function, int attribute, int value) {
    // The maximum dynamic shared memory of a launch. Devices of compute capability 8.6 have 99 KiB.
    if (attribute != 8 || value < 0 || value > 99 << 10) return INVALID;
    ((Function *)function)->shared = value;
    return SUCCESS;
}
API Result cuLaunchKernel(
    void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void *, void **arguments, void **
) {
    auto *own = (Function *)function;
    // A GPU's own limits.
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz > 1024 || shared > own->shared) return INVALID;
    launches(own->name.c_str());
    if (idle) return SUCCESS;
    void *bound = own->bind(arguments);
    return submit([=] {
        unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
        own->run(bound, grid, block, shared);
    });
}
API Result cuGetErrorName(int, const char **text) { return *text = "stand-in", SUCCESS; }
API Result cuGetErrorString(int, const char **text) { return *text = "error of the stand-in", SUCCESS; }
