//! The passes of a normalisation over the pixels of an image.

use crate::kernels::cpu::math::sigmoid;
use crate::kernels::cpu::simd::{Simd, for_channel_groups, for_channels, simd_fn};

/// Pixels per task, if the pixels of an image are divided among threads.
pub(super) const SPAN: usize = 64;

/// Number of pixels whose sums are taken in f32.
pub(crate) const RUN: usize = 32;

/// The statistics of an image: for each channel, mean and 1 / standard deviation of its group.
#[derive(Debug)]
pub(crate) struct Stats {
    pub(super) mean: Vec<f32>,
    pub(super) rstd: Vec<f32>,
}

impl Stats {
    /// Returns the factor of each channel, with these weights.
    pub(super) fn scale<'a>(&'a self, weight: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        weight.iter().zip(&self.rstd).map(|(w, r)| w * r)
    }
}

simd_fn! {
    /// Writes the sums over the pixels of a span, for each channel, of the differences from its mean, or of
    /// their squares.
    pub(super) fn span_sums<S>(sums: &mut [f64], x: &[f32], mean: &[f32], squares: bool) {
        let c = mean.len();
        sums.fill(0.0);
        // Short runs in f32, then f64.
        let mut run = vec![0f32; c];
        for x in x.chunks(RUN * c) {
            let (pixels, x, mean, run_sums) = (x.len() / c, x.as_ptr(), mean.as_ptr(), run.as_mut_ptr());
            // SAFETY: `x` has `pixels` times `c` values, and the other slices have one value per channel.
            unsafe {
                for_channel_groups!(i in c, [4, 2], sum_distances::<S>(
                    run_sums.add(i), x.add(i), mean.add(i), (pixels, c), squares,
                ));
            }
            sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += f64::from(*run));
        }
    }
}

/// Writes the sums over pixels that lie `c` values apart, of `N` vectors of channels. A single sum would wait for each
/// of its additions.
///
/// # Safety
/// Each pointer must be valid for `N` vectors, and `x` for those of each pixel.
#[inline(always)]
unsafe fn sum_distances<S: Simd, const N: usize>(
    sums: *mut f32,
    x: *const f32,
    mean: *const f32,
    (pixels, c): (usize, usize),
    squares: bool,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let (mut means, mut total) = ([S::splat(0.0); N], [S::splat(0.0); N]);
        for (k, value) in means.iter_mut().enumerate() {
            *value = S::load(mean.add(k * S::WIDTH));
        }
        for pixel in 0..pixels {
            for k in 0..N {
                let n = S::load(x.add(pixel * c + k * S::WIDTH)).sub(means[k]);
                total[k] = if squares { n.mul_add(n, total[k]) } else { total[k].add(n) };
            }
        }
        for (k, total) in total.into_iter().enumerate() {
            total.store(sums.add(k * S::WIDTH));
        }
    }
}

/// The normalisation of each channel `x` of an image: `z = (x - mean) scale + bias`. The mean is subtracted
/// first: as a part of the bias, a large mean would cancel with a loss of accuracy.
#[derive(Clone, Copy)]
pub(super) struct Affine<'a> {
    mean: &'a [f32],
    scale: &'a [f32],
    bias: &'a [f32],
}

impl<'a> Affine<'a> {
    pub(super) fn new(mean: &'a [f32], scale: &'a [f32], bias: &'a [f32]) -> Self {
        assert!(mean.len() == scale.len() && bias.len() == scale.len());
        Self { mean, scale, bias }
    }

    pub(super) fn channels(&self) -> usize {
        self.scale.len()
    }

    /// Returns the differences of the channels from `first` on from the mean, and the normalised values.
    ///
    /// # Safety
    /// A vector of channels must be left from `first` on.
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self, x: S, first: usize) -> (S, S) {
        // SAFETY: all three slices have the same number of channels.
        unsafe {
            let n = x.sub(S::load(self.mean.as_ptr().add(first)));
            let scale = S::load(self.scale.as_ptr().add(first));
            (n, n.mul_add(scale, S::load(self.bias.as_ptr().add(first))))
        }
    }
}

simd_fn! {
    /// Writes `y = silu(z)`, or `y = z`, from the normalised `z`. The pixels of `x` are this far apart.
    pub(super) fn normalize<S>(y: &mut [f32], x: &[f32], pixel: usize, affine: &Affine<'_>, silu: bool) {
        let c = affine.channels();
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks(pixel)) {
            let (y, x) = (y.as_mut_ptr(), x[..c].as_ptr());
            // SAFETY: `y` and `x` have the channels of a pixel.
            unsafe {
                for_channels!(i in c, normalize_channels::<S>(y, x, affine, i, silu));
            }
        }
    }
}

/// # Safety
/// A vector of channels must be left from `first` on.
#[inline(always)]
unsafe fn normalize_channels<S: Simd>(
    y: *mut f32,
    x: *const f32,
    affine: &Affine<'_>,
    first: usize,
    silu: bool,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let (_, z) = affine.apply(S::load(x.add(first)), first);
        let value = if silu { z.mul(sigmoid(z)) } else { z };
        value.store(y.add(first));
    }
}

simd_fn! {
    /// Replaces the gradient of `silu(z)`, if there is an activation, by that of `z`. Writes two sums over the
    /// pixels of an image: of the gradient times the difference from the mean, and of the gradient.
    pub(super) fn gradient_sums<S>(
        dz: &mut [f32], x: &[f32], affine: &Affine<'_>, silu: bool, sums: &mut [[f64; 2]],
    ) {
        let c = affine.channels();
        assert_eq!(dz.len(), x.len());
        sums.fill([0.0; 2]);
        // Short runs in f32, then f64.
        let mut run = vec![0f32; 2 * c];
        for (dz, x) in dz.chunks_mut(RUN * c).zip(x.chunks(RUN * c)) {
            let pixels = x.len() / c;
            let (dz, x, run_sums) = (dz.as_mut_ptr(), x.as_ptr(), run.as_mut_ptr());
            // SAFETY: `dz` and `x` have `pixels` times `c` values, and `run` has two per channel.
            unsafe {
                for_channel_groups!(i in c, [2], sum_gradients::<S>(dz, x, affine, (i, pixels), silu, run_sums));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                sums[0] += f64::from(run[i]);
                sums[1] += f64::from(run[c + i]);
            }
        }
    }
}

/// Processes `N` vectors of channels from `first` on of each pixel, and writes their two sums.
///
/// # Safety
/// `N` vectors of channels must be left from `first` on. `dz` and `x` must be valid for `pixels` pixels of all channels,
/// and `run` for two values per channel.
#[inline(always)]
unsafe fn sum_gradients<S: Simd, const N: usize>(
    dz: *mut f32,
    x: *const f32,
    affine: &Affine<'_>,
    (first, pixels): (usize, usize),
    silu: bool,
    run: *mut f32,
) {
    let (c, one) = (affine.channels(), S::splat(1.0));
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let (mut by_n, mut plain) = ([S::splat(0.0); N], [S::splat(0.0); N]);
        for pixel in 0..pixels {
            for (k, (by_n, plain)) in by_n.iter_mut().zip(&mut plain).enumerate() {
                let channel = first + k * S::WIDTH;
                let place = pixel * c + channel;
                let (n, z) = affine.apply(S::load(x.add(place)), channel);
                let mut d = S::load(dz.add(place));
                if silu {
                    let s = sigmoid(z);
                    d = d.mul(s.mul(one.add(z.mul(one.sub(s)))));
                    d.store(dz.add(place));
                }
                *by_n = d.mul_add(n, *by_n);
                *plain = d.add(*plain);
            }
        }
        for (sums, run) in [by_n, plain].iter().zip([run, run.add(c)]) {
            for (k, sum) in sums.iter().enumerate() {
                sum.store(run.add(first + k * S::WIDTH));
            }
        }
    }
}

simd_fn! {
    /// Replaces `dz` by `dx` plus `more`. `dx` is the sum of `dz`, the difference of `x` from the mean, and 1,
    /// each times a factor of the channel.
    pub(super) fn input_gradient<S>(
        dz: &mut [f32], x: &[f32], mean: &[f32], factors: &[Vec<f32>; 3], more: Option<&[f32]>,
    ) {
        let c = mean.len();
        assert!(factors.iter().all(|factors| factors.len() == c));
        assert!(more.is_none_or(|more| more.len() == dz.len()));
        let factors = [&factors[0], &factors[1], &factors[2]].map(|values| values.as_ptr());
        for (pixel, (dz, x)) in dz.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
            let more = more.map(|more| more[pixel * c..].as_ptr());
            let (dz, x, mean) = (dz.as_mut_ptr(), x.as_ptr(), mean.as_ptr());
            // SAFETY: all slices have the channels of a pixel.
            unsafe {
                for_channels!(i in c, input_channels::<S>(dz, x, mean, factors, more, i));
            }
        }
    }
}

/// # Safety
/// A vector of channels must be left from `first` on.
#[inline(always)]
unsafe fn input_channels<S: Simd>(
    dz: *mut f32,
    x: *const f32,
    mean: *const f32,
    factors: [*const f32; 3],
    more: Option<*const f32>,
    first: usize,
) {
    // SAFETY: the caller guarantees the requirements.
    unsafe {
        let [by_dz, by_n, constant] = [
            S::load(factors[0].add(first)),
            S::load(factors[1].add(first)),
            S::load(factors[2].add(first)),
        ];
        let n = S::load(x.add(first)).sub(S::load(mean.add(first)));
        let mut dx = by_dz.mul_add(S::load(dz.add(first)), by_n.mul_add(n, constant));
        if let Some(more) = more {
            dx = dx.add(S::load(more.add(first)));
        }
        dx.store(dz.add(first));
    }
}
