// Activations of vectors, sinusoids of timesteps, tables of vectors, and casts of weights.

extern "C" __global__ void cast(const float *x, T *y, u32 count) {
    u32 i = global_index();
    if (i < count) y[i] = put(x[i]);
}

// Computes [sin | cos] of each timestep times `half` geometrically falling frequencies, of which the first is `scale`.
// With `between`, t holds f32. With `flip`, the cosines come first.
extern "C" __global__ void sinusoids(
    const u32 *t, T *y, u32 half, double decay, double scale, int between, int flip, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 k = i % (2 * half);
    u32 image = i / (2 * half);
    double time = between ? (double)((const float *)t)[image] : (double)t[image];
    double angle = time * (scale * exp(-decay * (k % half)));
    y[i] = put((float)((k < half) != (flip != 0) ? sin(angle) : cos(angle)));
}

extern "C" __global__ void add_class(
    const T *x, const float *table, const u32 *index, T *y, u32 rows, u32 columns, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    u32 row = index[i / columns];
    float more = row < rows ? table[(u64)row * columns + i % columns] : not_a_number();
    y[i] = put(get(x[i]) + more);
}

// One thread per value of the sums, which adds the vectors of its row in the order of the batch.
extern "C" __global__ void sums_by_class(
    const T *x, const u32 *index, float *sums, u32 batch, u32 columns, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    double sum = 0.0;
    for (u32 k = 0; k < batch; ++k) {
        if (index[k] == i / columns) sum += get(x[(u64)k * columns + i % columns]);
    }
    sums[i] = (float)sum;
}

extern "C" __global__ void activate(const T *x, T *y, int f, u32 count) {
    u32 i = global_index();
    if (i < count) y[i] = put(activated(f, get(x[i])));
}

extern "C" __global__ void activate_backward(const T *x, T *d, int f, u32 count) {
    u32 i = global_index();
    if (i < count) d[i] = put(get(d[i]) * derivative(f, get(x[i])));
}
