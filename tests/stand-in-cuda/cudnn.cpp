// The part of cuDNN that the crate uses: convolutions of channels-last maps and both gradients, with sums
// in f64. It takes no channels that are no multiples of 8, as cuDNN's fast algorithms do not, and none at all
// where STAND_IN_WITHOUT_CUDNN is set, so that the crate goes its other way.
#include "values.h"
#include <cstdlib>
#include <functional>

struct Tensor {
    int type, n, c, h, w;
};
struct Filter {
    int type, k, c, r, s;
};
struct Convolution {
    int pad, stride;
};
struct Performance {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};

API size_t cudnnGetVersion() { return 92100; }
API int cudnnCreate(void **handle) { return *handle = (void *)1, 0; }
API int cudnnDestroy(void *) { return 0; }
API int cudnnSetStream(void *, void *) { return 0; }
API int cudnnCreateTensorDescriptor(Tensor **d) { return *d = new Tensor(), 0; }
API int cudnnDestroyTensorDescriptor(Tensor *d) { return delete d, 0; }
API int cudnnSetTensor4dDescriptor(Tensor *d, int format, int type, int n, int c, int h, int w) {
    *d = {type, n, c, h, w};
    return format == 1 ? 0 : 3000;
}
API int cudnnCreateFilterDescriptor(Filter **d) { return *d = new Filter(), 0; }
API int cudnnDestroyFilterDescriptor(Filter *d) { return delete d, 0; }
API int cudnnSetFilter4dDescriptor(Filter *d, int type, int format, int k, int c, int r, int s) {
    *d = {type, k, c, r, s};
    return format == 1 ? 0 : 3000;
}
API int cudnnCreateConvolutionDescriptor(Convolution **d) { return *d = new Convolution(), 0; }
API int cudnnDestroyConvolutionDescriptor(Convolution *d) { return delete d, 0; }
API int cudnnSetConvolution2dDescriptor(
    Convolution *d, int pad_h, int pad_w, int u, int v, int dilation_h, int dilation_w, int mode, int type
) {
    *d = {pad_h, u};
    return pad_h == pad_w && u == v && dilation_h == 1 && dilation_w == 1 && mode == 1 && type == 0 ? 0 : 3000;
}
API int cudnnSetConvolutionMathType(Convolution *, int) { return 0; }

static int choose(const Filter *w, int *count, Performance *found, size_t memory) {
    // The first is no use to who wants the same bits each time.
    found[0] = {0, 0, 1, 0, 0, 0, {}};
    // The real library also supports other numbers of channels, and their memory is counted.
    bool able = (w->c % 8 == 0 && w->k % 8 == 0) || getenv("STAND_IN_IDLE");
    able = able && !getenv("STAND_IN_WITHOUT_CUDNN");
    found[1] = {1, able ? 0 : 3000, 2, memory, 1, 3, {}};
    return *count = 2, 0;
}
API int cudnnGetConvolutionForwardAlgorithm_v7(
    void *, Tensor *, Filter *w, Convolution *, Tensor *, int, int *count, Performance *found
) {
    return choose(w, count, found, 0);
}
API int cudnnGetConvolutionBackwardDataAlgorithm_v7(
    void *, Filter *w, Tensor *, Convolution *, Tensor *, int, int *count, Performance *found
) {
    return choose(w, count, found, 1000);
}
API int cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    void *, Tensor *, Tensor *, Convolution *, Filter *w, int, int *count, Performance *found
) {
    return choose(w, count, found, 77);
}

// Calls f with the places of every input value, weight and output value that meet.
template <class F> static void each(const Tensor &x, const Filter &w, const Convolution &c, const Tensor &y, F f) {
    for (int n = 0; n < y.n; ++n)
        for (int i = 0; i < y.h; ++i)
            for (int j = 0; j < y.w; ++j)
                for (int r = 0; r < w.r; ++r)
                    for (int s = 0; s < w.s; ++s) {
                        int p = i * c.stride + r - c.pad, q = j * c.stride + s - c.pad;
                        if (p < 0 || q < 0 || p >= x.h || q >= x.w) continue;
                        for (int k = 0; k < w.k; ++k)
                            for (int l = 0; l < w.c; ++l)
                                f(((n * x.h + p) * x.w + q) * x.c + l, ((k * w.r + r) * w.s + s) * w.c + l,
                                  ((n * y.h + i) * y.w + j) * y.c + k);
                    }
}
static std::vector<double> zeros(const Tensor &t) { return std::vector<double>((size_t)t.n * t.h * t.w * t.c); }
static std::vector<double> zeros(const Filter &f) { return std::vector<double>((size_t)f.k * f.r * f.s * f.c); }
template <class D> static std::vector<double> values(const D &d, const void *memory) {
    std::vector<double> all = zeros(d);
    for (size_t i = 0; i < all.size(); ++i) all[i] = load(memory, d.type, i);
    return all;
}
template <class D> static void write(const D &d, void *memory, const std::vector<double> &all, float a, float b) {
    for (size_t i = 0; i < all.size(); ++i) {
        store(memory, d.type, i, (float)(a * all[i] + (b ? b * load(memory, d.type, i) : 0)));
    }
}
static int submit(const std::function<void()> &work) { return stand_in_submit(&work), 0; }

// cuDNN's numbers of types to CUDA's.
static Tensor plain(Tensor d) { return d.type = d.type == 2 ? 2 : d.type == 9 ? 14 : 0, d; }
static Filter plain(Filter d) { return d.type = d.type == 2 ? 2 : d.type == 9 ? 14 : 0, d; }

API int cudnnConvolutionForward(
    void *, const float *alpha, Tensor *xd, const void *x, Filter *wd, const void *w, Convolution *cd, int, void *,
    size_t, const float *beta, Tensor *yd, void *y
) {
    Tensor tx = plain(*xd), ty = plain(*yd);
    Filter tw = plain(*wd);
    Convolution c = *cd;
    float a = *alpha, b = *beta;
    return submit([=] {
        auto vx = values(tx, x), vw = values(tw, w), sum = zeros(ty);
        each(tx, tw, c, ty, [&](int i, int j, int k) { sum[k] += vx[i] * vw[j]; });
        write(ty, y, sum, a, b);
    });
}
API int cudnnConvolutionBackwardData(
    void *, const float *alpha, Filter *wd, const void *w, Tensor *yd, const void *dy, Convolution *cd, int, void *,
    size_t, const float *beta, Tensor *xd, void *dx
) {
    Tensor tx = plain(*xd), ty = plain(*yd);
    Filter tw = plain(*wd);
    Convolution c = *cd;
    float a = *alpha, b = *beta;
    return submit([=] {
        auto vy = values(ty, dy), vw = values(tw, w), sum = zeros(tx);
        each(tx, tw, c, ty, [&](int i, int j, int k) { sum[i] += vy[k] * vw[j]; });
        write(tx, dx, sum, a, b);
    });
}
API int cudnnConvolutionBackwardFilter(
    void *, const float *alpha, Tensor *xd, const void *x, Tensor *yd, const void *dy, Convolution *cd, int, void *,
    size_t, const float *beta, Filter *wd, void *dw
) {
    Tensor tx = plain(*xd), ty = plain(*yd);
    Filter tw = plain(*wd);
    Convolution c = *cd;
    float a = *alpha, b = *beta;
    return submit([=] {
        auto vx = values(tx, x), vy = values(ty, dy), sum = zeros(tw);
        each(tx, tw, c, ty, [&](int i, int j, int k) { sum[j] += vx[i] * vy[k]; });
        write(tw, dw, sum, a, b);
    });
}
