//! All randomness of the crate: Philox4x32-10 (Salmon et al. 2011), keyed by seed and addressed by purpose, step and
//! sample.
//!
//! No generator has a state that advances. A request for random numbers states their purpose, and returns the same
//! numbers at any time and in any order of requests. A resumed run therefore draws the numbers of an uninterrupted one,
//! sample `k` of a batch does not depend on the size of the batch, and a GPU can draw the same numbers from the same
//! counters. Logarithm and sine come from the portable `libm`, so normals have the same bits on every platform.

use candle_core::{DType, Device, Tensor};
use rand::RngCore;
use rayon::prelude::*;

use crate::error::{Error, Result, check_fraction};
use crate::memory::{reserved, zeros};

/// A seed, which determines every random number of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noise {
    seed: u64,
}

/// The address of the random numbers of all samples: the key, and the two parts of the counter's upper half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub seed: u64,
    pub place: u64,
    pub step: u64,
}

/// The purpose of random numbers. Streams of different purposes never overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Initial weights; `step` is a hash of the weight's name.
    Weights = 1,
    /// The order of images; `step` is the epoch.
    Shuffle = 2,
    /// Training timesteps.
    Timestep = 3,
    /// Training noise.
    Training = 4,
    /// Horizontal flips.
    Flip = 5,
    /// Dropout masks; `index` is the layer.
    Dropout = 6,
    /// `x_T` of a sample.
    Prior = 7,
    /// Noise within the sampling loop; `step` is the timestep.
    Sampling = 8,
    /// Noise of a sampling step whose noisier timestep an earlier step had, too; `step` is the index of the step.
    Resampling = 14,
    /// Random changes of training images by the data set, such as crops.
    Augment = 9,
    /// The offset of the training noise of each channel.
    Offset = 11,
    /// The images of a batch whose class the network does not see.
    ClassDropout = 10,
    /// Timesteps and noise of the held-out loss; `step` is 0 for the order of the timesteps, and 1 for the noise.
    HeldOut = 12,
    /// The choice of the held-out images.
    Split = 13,
    /// Subsets of images for the kernel distance; `step` is the subset, and `sample` 0 or 1 the set.
    Subset = 15,
    /// Directions of the sliced distance; `sample` is the direction.
    Direction = 16,
    /// Random numbers of likelihoods; `index` is their use, and `step` the timestep or the number of the probe.
    Likelihood = 17,
    /// The choice of images to measure; `step` is 0 for the images, 1 for the order of the parts of a score, and 2 for
    /// the order of the images that are divided into halves.
    Choice = 18,
}

impl Noise {
    /// Creates the source of the random numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Returns the numbers for one sample (its position within the batch) at one step.
    pub(crate) fn stream(self, purpose: Purpose, step: u64, sample: u32) -> Stream {
        self.indexed(purpose, 0, step, sample)
    }

    /// Returns the numbers of [`stream`](Self::stream) for the `index`-th user of the same purpose.
    pub(crate) fn indexed(self, purpose: Purpose, index: u16, step: u64, sample: u32) -> Stream {
        self.address(purpose, index, step).stream(sample)
    }

    /// Returns the address of the numbers of all samples.
    pub(crate) fn address(self, purpose: Purpose, index: u16, step: u64) -> Address {
        // 8 bits of purpose, 16 of index, 40 of step: a trillion steps before one repeats.
        let place = ((purpose as u64) << 56) | (u64::from(index) << 40);
        Address { seed: self.seed, place, step: step & 0xff_ffff_ffff }
    }
}

impl Address {
    /// Returns the numbers of one sample.
    pub fn stream(self, sample: u32) -> Stream {
        let Self { seed, place, step } = self;
        let place = place | step;
        Stream {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [0, sample, place as u32, (place >> 32) as u32],
            block: [0; 4],
            used: 4,
        }
    }
}

/// The random numbers of one purpose, step and sample, in order.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Stream {
    /// Draws a uniform integer in `0..bound`, without bias (Lemire 2019). `bound` must not be 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// Draws a uniform number in the open interval (0, 1), with 32 bits.
    pub fn uniform(&mut self) -> f64 {
        (f64::from(self.next_u32()) + 0.5) / 4294967296.0
    }

    /// Writes standard normals, two from each pair of integers (Box and Muller 1958). Their magnitude is at most 6.8,
    /// because the smallest uniform number is 2^-33.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        for pair in out.chunks_mut(2) {
            let radius = (-2.0 * libm::log(self.uniform())).sqrt();
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * self.uniform());
            pair[0] = (radius * cos) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * sin) as f32;
            }
        }
    }

    /// Draws a random order of `0..n` (Fisher and Yates).
    ///
    /// # Errors
    /// Returns an error if there is not enough memory.
    pub fn permutation(&mut self, n: usize) -> Result<Vec<u32>> {
        let Some(mut order) = reserved(&[n]) else {
            let expected = "small enough for their order in memory";
            return Err(Error::config("number of images", n, expected));
        };
        order.extend(0..n as u32);
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u32 + 1) as usize);
        }
        Ok(order)
    }
}

impl Stream {
    /// Returns the integers of `N` counters from `first` on. Integer `4 (first + i) + k` of the stream is at `[k][i]`.
    /// Inlined, so that it is compiled with the vectors of its caller.
    #[inline(always)]
    pub fn integers<const N: usize>(&self, first: u32) -> [[u32; N]; 4] {
        let [_, sample, low, high] = self.counter;
        let mut counters = [[0; N], [sample; N], [low; N], [high; N]];
        for (i, counter) in counters[0].iter_mut().enumerate() {
            *counter = first.wrapping_add(i as u32);
        }
        philox(counters, self.key)
    }
}

impl RngCore for Stream {
    fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox(self.counter.map(|part| [part]), self.key).map(|[part]| part);
            self.counter[0] = self.counter[0].wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    fn next_u64(&mut self) -> u64 {
        rand::rand_core::impls::next_u64_via_u32(self)
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        rand::rand_core::impls::fill_bytes_via_next(self, bytes)
    }
}

/// The dropout masks of one training step, from which [`Trainable::denoise_train`] draws.
///
/// [`Trainable::denoise_train`]: crate::nn::Trainable::denoise_train
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub(crate) noise: Noise,
    pub(crate) step: u64,
    /// Position, within the update's whole batch, of the first image of this forward pass.
    pub(crate) first_sample: usize,
}

impl Dropout {
    /// Returns the masks of training step `step`, counted from 0, with this seed. For use in a custom training loop.
    pub fn new(seed: u64, step: u64) -> Self {
        Self { noise: Noise::new(seed), step, first_sample: 0 }
    }

    /// Draws a mask of shape (batch, channels) for the network's `layer`-th dropout: 0 with probability `p`, and `1 /
    /// (1 - p)` otherwise. `p` is at least 0 and less than 1. The mask depends only on seed, step, layer and sample.
    ///
    /// # Errors
    /// Returns an error if `p` is out of its range, or if there is not enough memory for the mask.
    pub fn mask(
        &self,
        layer: u16,
        batch: usize,
        channels: usize,
        p: f64,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        check_fraction("dropout", p)?;
        let keep = Self::factor(p);
        let mut mask = zeros("mask", &[batch, channels])?;
        mask.par_chunks_mut(channels.max(1)).enumerate().for_each(|(k, maps)| {
            let mut stream = self.stream(layer, k);
            maps.iter_mut().for_each(|m| *m = if stream.uniform() < p { 0.0 } else { keep });
        });
        Ok(Tensor::from_vec(mask, (batch, channels), device)?.to_dtype(dtype)?)
    }

    /// The factor of values that are not dropped.
    pub(crate) fn factor(p: f64) -> f32 {
        (1.0 / (1.0 - p)) as f32
    }

    /// The largest integer of a stream whose value is dropped: the largest whose uniform number is less than `p`.
    pub(crate) fn last_dropped(p: f64) -> Option<u32> {
        // Exact: the product with a power of two, and a difference that has no more digits.
        let count = (p * 4294967296.0 - 0.5).ceil();
        (count >= 1.0).then_some((count - 1.0) as u32)
    }

    /// The random numbers of an image's mask, of which each determines one factor.
    pub(crate) fn stream(&self, layer: u16, image: usize) -> Stream {
        let sample = (self.first_sample + image) as u32;
        self.noise.indexed(Purpose::Dropout, layer, self.step, sample)
    }
}

/// Computes FNV-1a with 64 bits. The result is the same in every version and on every machine, unlike that of the
/// standard library's hash.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Computes ten rounds of Philox4x32 for `N` counters: four random integers for each. The first index is the part of
/// the counter, and then the number of the integer.
#[inline(always)]
fn philox<const N: usize>(
    mut counters: [[u32; N]; 4],
    [mut k0, mut k1]: [u32; 2],
) -> [[u32; N]; 4] {
    for _ in 0..10 {
        let [c0, c1, c2, c3] = &mut counters;
        for i in 0..N {
            let p0 = u64::from(c0[i]) * 0xD251_1F53;
            let p1 = u64::from(c2[i]) * 0xCD9E_8D57;
            c0[i] = (p1 >> 32) as u32 ^ c1[i] ^ k0;
            c2[i] = (p0 >> 32) as u32 ^ c3[i] ^ k1;
            (c1[i], c3[i]) = (p1 as u32, p0 as u32);
        }
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers that the authors publish with their code (Random123, `kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        let one = |counter: [u32; 4], key| philox(counter.map(|c| [c]), key).map(|[c]| c);
        assert_eq!(one([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(
            one([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            one([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn integers_by_number_are_those_in_order() {
        let mut stream = Noise::new(7).indexed(Purpose::Dropout, 3, 5, 2);
        let found = [stream.integers::<3>(0), stream.integers(3)]
            .map(|part| (0..12).map(|i| part[i % 4][i / 4]).collect::<Vec<u32>>());
        assert_eq!(found.concat(), (0..24).map(|_| stream.next_u32()).collect::<Vec<_>>());
    }

    #[test]
    fn the_last_dropped_integer_is_that_of_uniform_numbers() {
        let drops = |integer: u32, p: f64| (f64::from(integer) + 0.5) / 4294967296.0 < p;
        let smallest = 0.5 / 4294967296.0;
        for p in [0.1, 0.2, 0.5, 0.75, 1e-3, 1.5 / 4294967296.0, 2.0 * smallest, 1.0 - f64::EPSILON]
        {
            let last = Dropout::last_dropped(p).unwrap();
            assert!(drops(last, p), "{p}");
            assert!(last == u32::MAX || !drops(last + 1, p), "{p}");
        }
        assert_eq!([0.0, smallest].map(Dropout::last_dropped), [None; 2]);
    }

    #[test]
    fn hashes_are_the_published_ones() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    /// A change here breaks the promise that old checkpoints resume exactly.
    #[test]
    fn values_never_change() {
        let mut stream = Noise::new(7).stream(Purpose::Training, 3, 5);
        let mut normals = [0f32; 3];
        stream.fill_normal(&mut normals);
        // The values that Python computes from the same counters, with its own logarithm, sine and cosine.
        assert_eq!(normals.map(f32::to_bits), [3201282730, 1054440160, 1047156660]);
        assert_eq!(
            Noise::new(7).stream(Purpose::Shuffle, 0, 0).permutation(6).unwrap(),
            [1u32, 4, 3, 5, 0, 2]
        );
    }

    #[test]
    fn normals_are_standard() {
        let mut values = vec![0f32; 400_000];
        Noise::new(1).stream(Purpose::Prior, 0, 0).fill_normal(&mut values);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / n;
        // Five standard errors of each moment.
        for (k, expected, variance) in
            [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]
        {
            assert!((moment(k) - expected).abs() < 5.0 * (f64::sqrt(variance / n)), "moment {k}");
        }
        assert!(values.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn streams_of_every_address_differ() {
        let noise = Noise::new(0);
        let mut firsts = vec![Noise::new(1).stream(Purpose::Prior, 0, 0).next_u64()];
        for (index, step, sample) in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1 << 39, 0)] {
            firsts.push(noise.indexed(Purpose::Prior, index, step, sample).next_u64());
            firsts.push(noise.indexed(Purpose::Dropout, index, step, sample).next_u64());
        }
        let count = firsts.len();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts.len(), count);
    }

    #[test]
    fn permutations_hold_each_index_once_and_below_is_uniform() {
        let mut order = Noise::new(2).stream(Purpose::Shuffle, 0, 0).permutation(1000).unwrap();
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, &v)| i as u32 == v));

        let mut stream = Noise::new(2).stream(Purpose::Timestep, 0, 0);
        let mut counts = [0f64; 7];
        (0..70_000).for_each(|_| counts[stream.below(7) as usize] += 1.0);
        // Chi-square with 6 degrees of freedom: 27.9 has probability 1e-4.
        let chi_square: f64 = counts.iter().map(|c| (c - 1e4).powi(2) / 1e4).sum();
        assert!(chi_square < 27.9, "{counts:?}");
    }

    #[test]
    fn dropout_keeps_the_mean_and_its_own_layers() -> Result<()> {
        let mask = |layer| Dropout::new(1, 4).mask(layer, 64, 512, 0.2, DType::F32, &Device::Cpu);
        let values = mask(0)?.flatten_all()?.to_vec1::<f32>()?;
        assert!(values.iter().all(|&v| v == 0.0 || v == 1.25));
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((mean - 1.0).abs() < 0.015, "{mean}");
        assert_ne!(values, mask(1)?.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_mask_without_memory_is_an_error() {
        // More than the memory, more than the address space, and more than there are random numbers.
        for (batch, channels) in [(1 << 30, 1 << 20), (1 << 40, 1 << 23), (usize::MAX, 3)] {
            let mask = Dropout::new(0, 0).mask(0, batch, channels, 0.5, DType::F32, &Device::Cpu);
            let message = mask.unwrap_err().to_string();
            let expected = format!("mask has shape [{batch}, {channels}]; it must be small enough");
            assert!(message.contains(&expected), "{message}");
        }
    }
}
