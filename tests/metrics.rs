//! The metrics of sets of images, compared with closed forms, with numpy, and with torch-fidelity, pytorch-fid and
//! prdc.
//!
//! The environment variable `DDPM_METRICS` names a further folder, whose folders were made by
//! `tests/data/generate/metrics.py`. `DDPM_INCEPTION` names one whose folders were made by
//! `tests/data/generate/inception.py`, with their weights.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use ddpm::data::{Dataset, Images};
use ddpm::eval::{
    Balance, Classes, EfficientNet, Extractor, ExtractorIdentity, Features, Gaussian, Inception,
    KernelDistance, Nearest, Prdc, Resizing, SlicedDistance, Statistics, extract, inception_score,
    kernel_mmd2,
};
use safetensors::SafeTensors;
use serde_json::Value;

#[path = "small/numbers.rs"]
mod numbers;
use numbers::{assert_near, points};

fn diagonal(mean: &[f64], variances: &[f64]) -> Gaussian {
    let n = mean.len();
    let mut covariance = vec![0.0; n * n];
    covariance.iter_mut().step_by(n + 1).zip(variances).for_each(|(c, v)| *c = *v);
    Gaussian::new(mean.to_vec(), covariance).unwrap()
}

fn fit(points: &[f32], size: usize) -> Gaussian {
    let mut statistics = Statistics::new(size);
    statistics.add(points).unwrap();
    statistics.gaussian().unwrap()
}

fn distance(a: &Gaussian, b: &Gaussian) -> f64 {
    a.frechet_distance(b).unwrap()
}

#[test]
fn equal_gaussians_are_at_no_distance() {
    for (count, size) in [(50, 5), (200, 64), (3, 8)] {
        let gaussian = fit(&points(count, size, 1), size);
        // The distance is the root of rounding errors, also for a covariance without full rank.
        let distance = distance(&gaussian, &gaussian);
        assert!((0.0..1e-6).contains(&distance), "{distance}: {count} points of {size}");
    }
}

#[test]
fn a_shifted_mean_is_at_its_squared_distance() {
    let a = fit(&points(100, 6, 1), 6);
    let mean = a.mean().iter().enumerate().map(|(i, m)| m + i as f64).collect();
    let b = Gaussian::new(mean, a.covariance().to_vec()).unwrap();
    assert_near(distance(&a, &b), 55.0);
}

#[test]
fn diagonal_covariances_have_the_distance_of_their_deviations() {
    let a = diagonal(&[1.0, 2.0, 3.0, 0.0], &[4.0, 1.0, 0.0, 9.0]);
    let b = diagonal(&[1.0, 0.0, 3.0, 1.0], &[1.0, 1.0, 4.0, 0.25]);
    // Means: 4 + 1. Deviations: (2 - 1)^2, 0, 2^2 and 2.5^2.
    assert_near(distance(&a, &b), 16.25);
    assert_near(distance(&b, &a), 16.25);
}

/// The expected values are computed by numpy 2, with the eigenvalues of the product, which is not
/// symmetric. With the points `a` and `b` as float64, A = np.cov(a, rowvar=False), and B likewise:
/// ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * np.sqrt(np.linalg.eigvals(A @ B)).sum()
#[test]
fn full_covariances_have_the_distance_that_numpy_computes() {
    for (count, size, expected) in [(50, 5, 0.30657505349392977), (300, 16, 2.963219383633515)] {
        let of = |seed| fit(&points(count, size, seed), size);
        let (a, b) = (of(1), of(7_000_000));
        assert_near(distance(&a, &b), expected);
        assert_near(distance(&b, &a), expected);
    }
}

#[test]
fn mean_and_covariance_are_those_of_the_points() {
    let gaussian = fit(&[0.0, 2.0, 2.0, 4.0, 4.0, 0.0], 2);
    assert_eq!(gaussian.mean(), [2.0, 2.0]);
    assert_eq!(gaussian.covariance(), [4.0, -2.0, -2.0, 4.0]);
}

/// The statistics of parts merge to those of the whole, for any division into parts.
#[test]
fn statistics_of_parts_merge_to_those_of_the_whole() {
    let (count, size) = (90, 7);
    let points = points(count, size, 3);
    let mut whole = Statistics::new(size);
    whole.add(&points).unwrap();
    for parts in [vec![90], vec![1, 89], vec![30, 1, 0, 59], vec![45, 45]] {
        let (mut merged, mut start) = (Statistics::new(size), 0);
        for len in parts {
            let mut part = Statistics::new(size);
            part.add(&points[start * size..][..len * size]).unwrap();
            merged.merge(&part).unwrap();
            start += len;
        }
        assert_eq!(merged.count(), count as u64);
        let (merged, whole) = (merged.gaussian().unwrap(), whole.gaussian().unwrap());
        let values = |g: &Gaussian| [g.mean(), g.covariance()].concat();
        for (found, expected) in values(&merged).iter().zip(values(&whole)) {
            assert_near(*found, expected);
        }
    }
}

/// Sums of squares would lose all digits here.
#[test]
fn a_large_mean_does_not_hide_the_variance() {
    let gaussian = fit(&[16_777_214.0, 16_777_215.0, 16_777_216.0], 1);
    assert_eq!((gaussian.mean(), gaussian.covariance()), (&[16_777_215.0][..], &[1.0][..]));
}

#[test]
fn what_has_no_statistics_is_an_error() {
    let mut statistics = Statistics::new(2);
    let message = |result: ddpm::Result<()>| result.unwrap_err().to_string();
    assert!(
        message(statistics.add(&[1.0; 3]))
            .contains("features.len() is 3; it must be a multiple of 2")
    );
    assert!(
        message(statistics.add(&[1.0, f32::NAN])).contains("a feature is NaN; it must be finite")
    );
    assert_eq!(statistics.count(), 0);
    assert!(message(statistics.merge(&Statistics::new(3))).contains("features per image is 3"));
    statistics.add(&[1.0, 2.0]).unwrap();
    assert!(
        message(statistics.gaussian().map(drop))
            .contains("number of images is 1; it must be at least 2")
    );
    assert!(
        message(Gaussian::new(vec![0.0; 2], vec![1.0, 2.0, 3.0, 4.0]).map(drop))
            .contains("symmetric, 2 x 2")
    );
    let (a, b) = (diagonal(&[0.0], &[1.0]), diagonal(&[0.0; 2], &[1.0; 2]));
    assert!(message(a.frechet_distance(&b).map(drop)).contains("features per image is 2"));
}

#[test]
fn a_covariance_that_is_not_positive_semi_definite_is_an_error() {
    let one = diagonal(&[0.0; 2], &[1.0; 2]);
    for covariance in [vec![1.0, 2.0, 2.0, 1.0], vec![1.0, 0.0, 0.0, -1e-9]] {
        let indefinite = Gaussian::new(vec![0.0; 2], covariance).unwrap();
        for result in [one.frechet_distance(&indefinite), indefinite.frechet_distance(&one)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("it must be positive semi-definite"), "{message}");
        }
    }
    let message = |value| Gaussian::new(vec![0.0], vec![value]).unwrap_err().to_string();
    assert!(message(f64::NAN).contains("a mean or covariance is NaN; it must be finite"));
    let (large, small) = (diagonal(&[1e200], &[1.0]), diagonal(&[0.0], &[1.0]));
    let message = large.frechet_distance(&small).unwrap_err().to_string();
    assert!(message.contains("it must be finite"), "{message}");
}

/// A folder that `metrics.py` wrote.
struct Case {
    dir: PathBuf,
    tensors: HashMap<String, Tensor>,
    expected: Value,
    settings: Value,
}

impl Case {
    fn all() -> Vec<Self> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/metrics");
        let further = std::env::var_os("DDPM_METRICS").map(PathBuf::from);
        let mut cases = Vec::new();
        for folder in [own].into_iter().chain(further) {
            let before = cases.len();
            for entry in fs::read_dir(&folder).expect("a folder of cases") {
                cases.push(Self::open(entry.expect("an entry").path()));
            }
            assert!(cases.len() > before, "{} has no cases", folder.display());
        }
        cases
    }

    fn open(dir: PathBuf) -> Self {
        let file = fs::read(dir.join("metrics.safetensors")).expect("metrics.safetensors");
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        let json = |name: &str| serde_json::from_str(&metadata[name]).unwrap();
        let tensors = candle_core::safetensors::load_buffer(&file, &Device::Cpu).unwrap();
        Self { dir, tensors, expected: json("expected"), settings: json("settings") }
    }

    /// The real images, and the generated ones with their logits.
    fn sets(&self) -> (Features, Features) {
        let values = |name| self.values::<f32>(name);
        let size = |name: &str| self.tensors[name].dims()[1];
        let mut first = Features::new(size("first"));
        first.add(&values("first")).unwrap();
        let mut second = Features::with_classes(size("second"), Classes::Logits(size("logits")));
        second.add_scored(&values("second"), &values("logits")).unwrap();
        (first, second)
    }

    fn values<T: candle_core::WithDType>(&self, name: &str) -> Vec<T> {
        self.tensors[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn setting(&self, name: &str) -> usize {
        self.settings[name].as_u64().unwrap() as usize
    }

    #[track_caller]
    fn check(&self, name: &str, found: f64, tolerance: f64) {
        let Some(expected) = self.expected.get(name).and_then(Value::as_f64) else { return };
        let error = (found - expected).abs() / expected.abs();
        let dir = self.dir.display();
        assert!(error <= tolerance, "{dir}: {name} is {found}, not {expected}");
    }
}

/// The set with the fewest images has fewer than features. `frechet` is computed from the singular values of the
/// points, so it has no rounding of a singular covariance, which torch-fidelity has.
#[test]
fn frechet_distances_are_those_of_numpy_torch_fidelity_and_pytorch_fid() {
    for case in Case::all() {
        let (first, second) = case.sets();
        let [a, b] = [&first, &second].map(|set| Statistics::of(set).unwrap());
        for distance in [a.frechet_distance(&b).unwrap(), b.frechet_distance(&a).unwrap()] {
            case.check("frechet", distance, 1e-9);
            case.check("frechet_torch_fidelity", distance, 1e-6);
            case.check("frechet_pytorch_fid", distance, 1e-6);
        }
        let gaussian = b.gaussian().unwrap();
        let found = [gaussian.mean(), gaussian.covariance()].concat();
        let expected = [case.values::<f64>("mean"), case.values("covariance")].concat();
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
        }
    }
}

#[test]
fn kernel_distances_are_those_of_torch_fidelity_for_the_same_subsets() {
    for case in Case::all() {
        let (first, second) = case.sets();
        let mut distance = KernelDistance::default();
        distance.subsets = case.setting("subsets");
        distance.subset_size = case.setting("subset_size");
        distance.seed = case.setting("seed") as u64;
        let found = distance.measure(&first, &second).unwrap();
        case.check("kernel_mean", found.mean, 1e-9);
        case.check("kernel_deviation", found.deviation, 1e-9);
        case.check("kernel_mmd2", kernel_mmd2(&first, &second).unwrap(), 1e-9);
        assert_eq!(found.parts, distance.subsets);
        let error = found.deviation / (found.parts as f64 - 1.0).sqrt();
        assert_eq!(found.standard_error(), error);
    }
}

#[test]
fn inception_scores_are_those_of_torch_fidelity() {
    for case in Case::all() {
        let (_, second) = case.sets();
        let found = inception_score(&second, case.setting("splits")).unwrap();
        case.check("inception_mean", found.mean, 1e-9);
        case.check("inception_deviation", found.deviation, 1e-9);
        let Some(Classes::Logits(classes)) = second.classes() else { panic!("no logits") };
        // Probabilities in f32 have the same score up to their rounding.
        let mut scored = Features::with_classes(1, Classes::Probabilities(classes));
        for logits in second.scores().chunks(classes) {
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let p: Vec<f32> = logits.iter().map(|&x| (f64::from(x).exp() / sum) as f32).collect();
            scored.add_scored(&[0.0], &p).unwrap();
        }
        let found = inception_score(&scored, case.setting("splits")).unwrap();
        case.check("inception_mean", found.mean, 1e-6);
    }
}

#[test]
fn precision_recall_density_and_coverage_are_those_of_prdc() {
    for case in Case::all() {
        let (first, second) = case.sets();
        let found = Prdc::measure(&first, &second, case.setting("k")).unwrap();
        case.check("precision", found.precision, 1e-12);
        case.check("recall", found.recall, 1e-12);
        case.check("density", found.density, 1e-12);
        case.check("coverage", found.coverage, 1e-12);
    }
}

/// torch-fidelity computes the formula in float32, so the expected values are NumPy's.
#[test]
fn sliced_distances_are_those_of_numpy_for_the_same_directions() {
    for case in Case::all() {
        let (first, second) = case.sets();
        let mut distance = SlicedDistance::default();
        distance.directions = case.setting("directions");
        distance.seed = case.setting("seed") as u64;
        case.check("sliced", distance.measure(&first, &second).unwrap(), 1e-9);
        case.check("sliced", distance.measure(&second, &first).unwrap(), 1e-9);
    }
}

#[test]
fn nearest_images_and_classes_are_those_of_numpy() {
    for case in Case::all() {
        let (first, second) = case.sets();
        let nearest = Nearest::find(&second, &first, case.setting("k")).unwrap();
        let found = (0..nearest.count()).flat_map(|i| nearest.of(i));
        let expected =
            case.values::<i64>("nearest").into_iter().zip(case.values::<f64>("distances"));
        for ((index, distance), (expected_index, expected)) in found.zip(expected) {
            assert_eq!(index, expected_index as usize);
            assert!((distance / expected - 1.0).abs() < 1e-12, "{distance}, not {expected}");
        }
        assert_eq!(nearest.count(), second.count());
        let balance = Balance::measure(&second, Some(&case.values("shares"))).unwrap();
        let counts: Vec<u64> = case.values::<i64>("counts").iter().map(|&n| n as u64).collect();
        assert_eq!(balance.counts(), counts);
        case.check("total_variation", balance.total_variation(), 1e-9);
        case.check("divergence", balance.divergence(), 1e-9);
    }
}

fn features(values: &[f32], size: usize) -> Features {
    let mut features = Features::new(size);
    features.add(values).unwrap();
    features
}

#[test]
fn a_shift_has_three_times_its_square_as_the_sliced_distance() {
    let first = points(60, 5, 1);
    let shift = [0.5, -1.0, 2.0, 0.0, 1.5];
    let second: Vec<f32> = first.iter().zip(shift.iter().cycle()).map(|(x, s)| x + s).collect();
    let mut distance = SlicedDistance::default();
    distance.directions = 20_000;
    let found = distance.measure(&features(&first, 5), &features(&second, 5)).unwrap();
    // (u . s)^2 has the mean |s|^2 / d; six standard errors of 20,000 directions.
    let expected: f32 = 3.0 * shift.iter().map(|s| s * s).sum::<f32>();
    assert!((found / f64::from(expected) - 1.0).abs() < 0.05, "{found}, not {expected}");
    // In one dimension every direction gives the exact distance, here that of quantiles of different counts.
    let found = SlicedDistance::default().measure(&features(&[0.0], 1), &features(&[-1.0, 3.0], 1));
    assert_eq!(found.unwrap(), 15.0);
}

#[test]
fn a_set_has_all_of_its_own_images() {
    let set = features(&points(40, 4, 1), 4);
    for k in [1, 5] {
        let Prdc { precision, recall, density, coverage } = Prdc::measure(&set, &set, k).unwrap();
        assert_eq!([precision, recall, coverage], [1.0; 3]);
        // The ball of an image has its centre and its k nearest, the last one on its surface.
        assert!((density - (k as f64 + 1.0) / k as f64).abs() < 1e-12, "{density}");
    }
    let far: Vec<f32> = points(40, 4, 1).iter().map(|x| x + 100.0).collect();
    let none = Prdc::measure(&set, &features(&far, 4), 3).unwrap();
    assert_eq!([none.precision, none.recall, none.density, none.coverage], [0.0; 4]);
}

/// Distances of about 1e-3 between features of about 1e8 have no digits in `|x|^2 + |y|^2 - 2 x . y`.
#[test]
fn near_images_far_from_the_origin_are_told_apart() {
    let training: Vec<f32> = (0..50).flat_map(|i| [1e8, i as f32 / 1024.0]).collect();
    let samples = [1e8, 20.0 / 1024.0, 1e8, 31.0 / 1024.0 + 0.25];
    let nearest = Nearest::find(&features(&samples, 2), &features(&training, 2), 3).unwrap();
    let expected = [(20, 0.0), (19, 1.0 / 1024.0), (21, 1.0 / 1024.0)];
    assert_eq!(nearest.of(0).collect::<Vec<_>>(), expected);
    assert_eq!(nearest.of(1).next().unwrap().0, 49);
    assert_eq!(nearest.of(2).count(), 0);
    assert_eq!(nearest.share_near_second(1.0 / 3.0), 0.5);
    assert_eq!(nearest.share_near_mean(0.5), 0.5);
    // A copy of an image that occurs twice is memorised, too.
    let nearest = Nearest::find(&features(&[1.0], 1), &features(&[1.0, 1.0, 5.0], 1), 2).unwrap();
    assert_eq!((nearest.share_near_second(0.5), nearest.share_near_mean(0.5)), (1.0, 1.0));
}

#[test]
fn metrics_have_the_same_bits_for_any_number_of_threads() {
    let (first, second) = (features(&points(2100, 40, 1), 40), features(&points(1100, 40, 9), 40));
    let all = || {
        let [a, b] = [&first, &second].map(|set| Statistics::of(set).unwrap());
        let prdc = Prdc::measure(&first, &second, 4).unwrap();
        let (mut kernel, mut sliced) = (KernelDistance::default(), SlicedDistance::default());
        (kernel.subsets, sliced.directions) = (2, 40);
        let kernel = kernel.measure(&first, &second).unwrap();
        let distance = a.frechet_distance(&b).unwrap();
        (a, distance, prdc, kernel, sliced.measure(&first, &second).unwrap())
    };
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(all)
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn statistics_files_of_numpy_are_read_and_written() {
    for case in Case::all() {
        let (mean, covariance) = (case.values::<f64>("mean"), case.values::<f64>("covariance"));
        let expected = Gaussian::new(mean, covariance).unwrap();
        let [deflated, stored] = ["deflated.npz", "stored.npz"].map(|name| case.dir.join(name));
        assert_eq!(Gaussian::read(deflated).unwrap(), expected);
        assert_eq!(Gaussian::read(&stored).unwrap(), expected);
        let spatial = Gaussian::read_spatial(&stored).unwrap();
        for (found, expected) in spatial.covariance().iter().zip(expected.covariance()) {
            assert_eq!(*found, f64::from(*expected as f32));
        }
        // The covariance of few images in float32 is indefinite by its rounding.
        let distance = spatial.frechet_distance(&expected).unwrap();
        assert!(distance < 1e-5, "{distance}");

        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("written.npz");
        expected.write(&path).unwrap();
        assert_eq!(Gaussian::read(&path).unwrap(), expected);
        // NumPy's file has the same bytes of both arrays.
        let (written, numpy) = (fs::read(&path).unwrap(), fs::read(&stored).unwrap());
        let start = |bytes: &[u8], of: &[u8]| {
            bytes.windows(of.len()).position(|window| window == of).expect("an array")
        };
        let n = expected.mean().len();
        for (name, len) in [(&b"mu.npy"[..], 128 + 8 * n), (b"sigma.npy", 128 + 8 * n * n)] {
            let array = &written[start(&written, name) + name.len()..][..len];
            assert!(array.starts_with(b"\x93NUMPY"));
            start(&numpy, array);
        }
    }
}

/// A header can claim any size. Each byte of the headers is changed in turn, and the file is cut at each length.
#[test]
fn damaged_statistics_files_are_errors() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("damaged.npz");
    // Some file systems wait for the disk if a file is replaced.
    let write = |content: &[u8]| {
        fs::remove_file(&path).unwrap();
        fs::write(&path, content).unwrap();
    };
    let whole = Gaussian::new(vec![1.0, 2.0], vec![2.0, 1.0, 1.0, 2.0]).unwrap();
    whole.write(&path).unwrap();
    let file = fs::read(&path).unwrap();
    for len in 0..file.len() {
        write(&file[..len]);
        assert!(Gaussian::read(&path).is_err(), "{len} bytes");
    }
    for i in 0..file.len() {
        for change in [0x01, 0x80, 0xff] {
            let mut changed = file.clone();
            changed[i] ^= change;
            write(&changed);
            // Bytes that say nothing of the arrays, such as dates, may change.
            if let Ok(read) = Gaussian::read(&path) {
                assert_eq!(read, whole, "byte {i}");
            }
        }
    }
    let deflated =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/metrics/few/deflated.npz");
    let (file, whole) = (fs::read(&deflated).unwrap(), Gaussian::read(&deflated).unwrap());
    for i in (0..file.len()).step_by(7) {
        let mut changed = file.clone();
        changed[i] ^= 0x41;
        write(&changed);
        if let Ok(read) = Gaussian::read(&path) {
            assert_eq!(read, whole, "byte {i}");
        }
    }
    let message = |path: &Path| Gaussian::read(path).unwrap_err().to_string();
    let missing = Gaussian::read_spatial(&deflated).unwrap_err().to_string();
    assert!(missing.contains("damaged file: the array mu_s is missing"), "{missing}");
    write(b"PK");
    assert!(message(&path).contains("it has no ZIP directory"));
}

#[test]
fn what_has_no_metric_is_an_error() {
    fn message<T>(result: ddpm::Result<T>) -> String {
        result.err().expect("an error").to_string()
    }
    let (set, other) = (features(&points(10, 2, 1), 2), features(&[0.0; 6], 3));
    let sliced = SlicedDistance::default();
    for (directions, found) in [(0, "directions is 0"), (1 << 32, "directions is 4294967296")] {
        let mut sliced = SlicedDistance::default();
        sliced.directions = directions;
        assert!(message(sliced.measure(&set, &set)).contains(found));
    }
    let mut kernel = KernelDistance::default();
    let size = "features per image is 3; it must be 2";
    assert!(message(kernel_mmd2(&set, &other)).contains(size));
    assert!(message(sliced.measure(&set, &other)).contains(size));
    assert!(message(Prdc::measure(&set, &other, 1)).contains(size));
    assert!(message(Nearest::find(&set, &other, 1)).contains(size));
    assert!(
        message(kernel.measure(&set, &set))
            .contains("number of images is 10; it must be at least 1000")
    );
    (kernel.subset_size, kernel.subsets) = (1, 1);
    assert!(
        message(kernel.measure(&set, &set)).contains("subset_size is 1; it must be at least 2")
    );
    (kernel.subset_size, kernel.subsets) = (5, 0);
    assert!(message(kernel.measure(&set, &set)).contains("subsets is 0; it must be at least 1"));
    assert!(message(Prdc::measure(&set, &set, 10)).contains("must be at least 11"));
    assert!(message(Prdc::measure(&set, &set, 0)).contains("k is 0; it must be at least 1"));
    assert!(message(Prdc::measure(&set, &set, usize::MAX)).contains("number of images is 10"));
    assert!(message(Nearest::find(&set, &set, 11)).contains("number of images is 10"));
    assert!(message(Nearest::find(&Features::new(2), &set, 1)).contains("number of images is 0"));
    assert!(message(inception_score(&set, 1)).contains("classes is None"));
    assert!(message(inception_score(&set, 11)).contains("splits is 11"));
    assert!(message(Balance::measure(&set, None)).contains("classes is None"));
    assert!(message(set.select(&[10])).contains("index is 10; it must be less than 10"));
    let none = Features::new(0);
    assert!(message(Features::new(0).add(&[1.0])).contains("a multiple of 0"));
    assert!(message(Statistics::of(&none)).contains("a multiple of 0"));
    assert!(message(Prdc::measure(&none, &none, 1)).contains("number of images is 0"));

    let mut logits = Features::with_classes(1, Classes::Logits(2));
    assert!(message(logits.add(&[1.0])).contains("scores.len() is 0; it must be 2 for each of 1"));
    assert!(message(logits.add_scored(&[1.0], &[0.0, f32::INFINITY])).contains("a score is inf"));
    assert!(message(logits.append(&features(&[1.0], 1))).contains("classes is None"));
    logits.add_scored(&[1.0], &[0.0, 1.0]).unwrap();
    for expected in [&[1.0][..], &[0.5, 0.6], &[1.5, -0.5], &[f64::NAN, 1.0]] {
        let expected = Balance::measure(&logits, Some(expected));
        assert!(message(expected).contains("2 shares of at least 0 with the sum 1"));
    }
    let unexpected = Balance::measure(&logits, Some(&[1.0, 0.0])).unwrap();
    assert_eq!((unexpected.divergence(), unexpected.total_variation()), (f64::INFINITY, 1.0));
    let mut shares = Features::with_classes(1, Classes::Probabilities(2));
    assert!(message(shares.add_scored(&[1.0], &[0.5, 0.4])).contains("it must be 1, up to 0.001"));
    assert!(message(shares.add_scored(&[1.0], &[1.5, -0.5])).contains("a probability is -0.5"));
    assert_eq!((shares.count(), logits.count()), (0, 1));
}

/// The mean and the maximum of the bytes of an image, and whether it is bright.
struct Bytes {
    size: usize,
}

impl Extractor for Bytes {
    fn size(&self) -> usize {
        self.size
    }

    fn identity(&self) -> ExtractorIdentity {
        let mut identity = ExtractorIdentity::new("bytes");
        identity.weights_sha256 = Some("00ff".into());
        identity.resizing = Some("none".into());
        identity
    }

    fn extract(&self, images: &Images) -> ddpm::Result<Features> {
        let mut features = Features::with_classes(2, Classes::Logits(2));
        for i in 0..images.len() {
            let pixels = images.get(i).unwrap();
            let mean = pixels.iter().map(|&p| f32::from(p)).sum::<f32>() / pixels.len() as f32;
            let top = f32::from(*pixels.iter().max().unwrap());
            features.add_scored(&[mean, top], &[100.0 - mean, mean - 100.0])?;
        }
        Ok(features)
    }
}

#[test]
fn an_extractor_sees_all_images_in_batches() {
    let pixels: Vec<u8> = (0..22 * 6).map(|i| (i * 37 % 251) as u8).collect();
    let images = Images::new(pixels, (1, 2, 3)).unwrap();
    let extractor = Bytes { size: 2 };
    let all = extractor.extract(&images).unwrap();
    for batch in [1, 5, 22, 100] {
        assert_eq!(Features::extracted(&extractor, &images, batch).unwrap(), all);
        let statistics = Statistics::extracted(&extractor, &images, batch).unwrap();
        assert_eq!(statistics.count(), 22);
        let (found, expected) = (statistics.gaussian().unwrap(), fit(all.values(), 2));
        assert!(distance(&found, &expected) < 1e-6);
    }
    let mut batches = vec![];
    let flow = extract(&extractor, &images, 10, |features| {
        batches.push(features.count());
        Ok(if batches.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    });
    assert_eq!((flow.unwrap(), batches), (ControlFlow::Break(()), vec![10, 10]));
    assert_eq!(extractor.identity().to_string(), "bytes, weights 00ff, resizing none");
    let message = |result: ddpm::Result<Features>| result.unwrap_err().to_string();
    assert!(
        message(Features::extracted(&Bytes { size: 3 }, &images, 9)).contains("has shape [9, 2]")
    );
    assert!(message(Features::extracted(&extractor, &images, 0)).contains("batch is 0"));
}

/// The features and logits that other programs compute with a network whose weights are made by a formula.
struct OfNetwork {
    /// The name of the folder and of the file in it.
    network: &'static str,
    results: HashMap<String, Tensor>,
    /// Names and shapes.
    weights: Vec<(String, Vec<usize>)>,
    /// The name of each set of images, and its number of images, channels, height and width.
    images: BTreeMap<String, [usize; 4]>,
    /// The file of the weights, if they are not made by the formula.
    file: Option<PathBuf>,
}

impl OfNetwork {
    /// The case of Inception in this repository, by pytorch-fid and torch-fidelity.
    fn inception() -> Self {
        Self::own("inception")
    }

    /// The case of EfficientNet-lite0, by efficientnet-lite-pytorch.
    fn efficientnet() -> Self {
        Self::own("efficientnet")
    }

    fn own(network: &'static str) -> Self {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        Self::open(network, &data.join(network))
    }

    /// All cases of Inception.
    fn all() -> Vec<Self> {
        let mut cases = vec![Self::inception()];
        if let Some(folder) = std::env::var_os("DDPM_INCEPTION") {
            for entry in fs::read_dir(folder).expect("a folder of cases") {
                cases.push(Self::open("inception", &entry.expect("an entry").path()));
            }
            assert!(cases.len() > 1, "DDPM_INCEPTION has no cases");
        }
        cases
    }

    fn open(network: &'static str, dir: &Path) -> Self {
        let file = dir.join(format!("{network}.safetensors"));
        let file = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
        let metadata = metadata.metadata().clone().unwrap();
        let weights = dir.join("weights.safetensors");
        Self {
            network,
            results: candle_core::safetensors::load_buffer(&file, &Device::Cpu).unwrap(),
            weights: serde_json::from_str(&metadata["weights"]).unwrap(),
            images: serde_json::from_str(&metadata["images"]).unwrap(),
            file: weights.exists().then_some(weights),
        }
    }

    /// The weights that the generator makes, by its formula.
    fn made(&self) -> HashMap<String, Tensor> {
        let made = |(stream, (name, shape)): (usize, &(String, Vec<usize>))| {
            let unit = |i: usize| (hashed(stream, i) >> 8) as f32 / (1 << 24) as f32;
            let (len, fan_in) =
                (shape.iter().product(), shape[1..].iter().product::<usize>() as f64);
            let bound = if shape.len() > 1 { (6.0 / fan_in).sqrt() } else { 0.2 } as f32;
            let factor = name.ends_with(".weight") && shape.len() == 1;
            let positive = factor || name.ends_with("running_var");
            let value = |i| match positive {
                true => unit(i) + 0.5,
                false => (unit(i) * 2.0 - 1.0) * bound,
            };
            let values: Vec<f32> = (0..len).map(value).collect();
            (name.clone(), Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap())
        };
        self.weights.iter().enumerate().map(made).collect()
    }

    /// Loads the network with the weights of the case.
    fn load<N>(&self, load: impl FnOnce(&Path) -> ddpm::Result<N>) -> N {
        match &self.file {
            Some(file) => load(file).unwrap(),
            None => loaded(&self.made(), load).unwrap(),
        }
    }

    /// Compares the features and logits of a set of images with results, whose names begin with `results`.
    fn check(&self, network: &impl Extractor, name: &str, results: &str) {
        let found = network.extract(&self.images(name)).unwrap();
        for (what, found) in [("features", found.values()), ("logits", found.scores())] {
            let error = relative_error(found, &self.results[&format!("{results}.{what}")]);
            assert!(error < 1e-4, "{}: {results}, {what}: {error}", self.network);
        }
    }

    /// The images of a set.
    fn images(&self, name: &str) -> Images {
        // The streams follow the order of the names.
        let stream = 1000 + self.images.keys().position(|n| n == name).unwrap();
        let [count, channels, h, w] = self.images[name];
        let byte = |i: usize| {
            let (channel, number) = (i / (w * h) % channels, i / (w * h * channels));
            let wave = i % w * (3 + channel) + i / w % h * (5 + number) + 40 * channel;
            let up = wave % 256 < 128;
            let wave = if up { wave % 128 } else { 127 - wave % 128 };
            wave as u8 + (hashed(stream, i) >> 25) as u8
        };
        Images::new((0..count * channels * h * w).map(byte).collect(), (channels, h, w)).unwrap()
    }
}

/// 32 random bits for number `i` of a stream.
fn hashed(stream: usize, i: usize) -> u32 {
    let start = (stream as u32).wrapping_mul(0x85eb_ca6b);
    let mut x = (i as u32).wrapping_mul(0x9e37_79b9).wrapping_add(start);
    for factor in [0x7feb_352d, 0x846c_a68b] {
        x = (x ^ (x >> 16)).wrapping_mul(factor);
    }
    x ^ (x >> 16)
}

/// Writes weights to a file, and loads them as a network.
fn loaded<N>(
    weights: &HashMap<String, Tensor>,
    load: impl FnOnce(&Path) -> ddpm::Result<N>,
) -> ddpm::Result<N> {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("weights.safetensors");
    candle_core::safetensors::save(weights, &path).unwrap();
    load(&path)
}

/// The largest error, relative to the largest value.
fn relative_error(found: &[f32], expected: &Tensor) -> f32 {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len());
    let error = found.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    error / expected.iter().map(|y| y.abs()).fold(0.0, f32::max)
}

#[test]
fn inception_computes_the_features_and_logits_of_pytorch_fid_and_torch_fidelity() {
    for case in OfNetwork::all() {
        let mut network = case.load(|file| Inception::load(file));
        for (program, resizing) in
            [("pytorch_fid", Resizing::PytorchFid), ("tensorflow_1", Resizing::TensorFlow1)]
        {
            network = network.with_resizing(resizing);
            for name in case.images.keys() {
                case.check(&network, name, &format!("{name}.{program}"));
            }
        }
    }
}

#[test]
fn efficientnet_computes_the_features_and_logits_of_efficientnet_lite_pytorch() {
    let case = OfNetwork::efficientnet();
    let network = case.load(|file| EfficientNet::load(file));
    for name in case.images.keys() {
        case.check(&network, name, name);
    }
    // More images than are computed at a time.
    let colour = case.images("colour");
    let many = Images::new(colour.pixels().repeat(17), (3, 32, 32)).unwrap();
    let many = network.extract(&many).unwrap();
    let found = network.extract(&colour).unwrap();
    assert_eq!(many.get(16), found.get(0));
    assert_eq!(found.classes(), Some(Classes::Logits(1000)));

    let identity = network.identity();
    assert_eq!(identity.weights_sha256.map(|sum| sum.len()), Some(64));
    assert!(identity.resizing.unwrap().contains("224 x 224"));
    // A weight that the network does not have.
    let mut weights = case.made();
    weights
        .insert("fc.bias".into(), Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap());
    let error = loaded(&weights, |file| EfficientNet::load(file)).unwrap_err().to_string();
    assert!(error.contains("fc.bias"), "{error}");
}

#[test]
fn the_features_of_inception_depend_on_the_image_alone() {
    let case = OfNetwork::inception();
    let network = case.load(|file| Inception::load(file));
    let images = case.images("colour");
    let together = network.extract(&images).unwrap();
    assert_eq!(together.classes(), Some(Classes::Logits(1008)));
    let second = images.get(1).unwrap();
    // More images than are computed at once, on one thread.
    let many = Images::new(second.repeat(17), (3, 32, 32)).unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let many = one.install(|| network.extract(&many)).unwrap();
    assert_eq!(many.count(), 17);
    for i in [0, 15, 16] {
        assert_eq!(many.get(i), together.get(1));
    }
    assert_ne!(together.get(0), together.get(1));

    // A grey image is a colour image with equal channels, and an RGB image is not the same as BGR.
    let grey = Images::new(second[..1024].to_vec(), (1, 32, 32)).unwrap();
    let same = Images::new(second[..1024].repeat(3), (3, 32, 32)).unwrap();
    assert_eq!(network.extract(&grey).unwrap().values(), network.extract(&same).unwrap().values());
    let two = Images::new(vec![0; 8], (2, 2, 2)).unwrap();
    let message = network.extract(&two).unwrap_err().to_string();
    assert_eq!(message, "channels of the images is 2; it must be 1 (grey) or 3 (RGB)");
    assert_eq!(network.extract(&Images::new(vec![], (3, 5, 5)).unwrap()).unwrap().count(), 0);

    let identity = network.identity();
    assert_eq!(identity.weights_sha256.map(|sum| sum.len()), Some(64));
    let other = network.with_resizing(Resizing::TensorFlow1).identity();
    assert_ne!(other.resizing, identity.resizing);
}

#[test]
fn weights_of_other_networks_are_not_inception() {
    let mut weights = OfNetwork::inception().made();
    let load = |weights: &HashMap<String, Tensor>| loaded(weights, |file| Inception::load(file));
    let message = |weights: &HashMap<String, Tensor>| load(weights).unwrap_err().to_string();
    let small = Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap();
    weights.insert("AuxLogits.fc.bias".into(), small.clone());
    assert!(message(&weights).contains("AuxLogits.fc.bias"));
    weights.remove("AuxLogits.fc.bias");
    // The number of batches that a normalisation has seen is not needed.
    let batches = Tensor::zeros((), candle_core::DType::I64, &Device::Cpu).unwrap();
    weights.insert("Mixed_7c.branch1x1.bn.num_batches_tracked".into(), batches);
    let bias = weights.insert("Mixed_7c.branch1x1.bn.bias".into(), small);
    assert!(message(&weights).contains("[3]"));
    weights.remove("Mixed_7c.branch1x1.bn.bias");
    assert!(message(&weights).contains("Mixed_7c.branch1x1.bn.bias"));
    weights.insert("Mixed_7c.branch1x1.bn.bias".into(), bias.unwrap());
    load(&weights).unwrap();

    // Finite values with which features would be NaN or infinite. A variance of 0 makes the factors large.
    let variance = "Conv2d_1a_3x3.bn.running_var".to_owned();
    let zeros = weights[&variance].zeros_like().unwrap();
    weights.insert(variance, zeros);
    load(&weights).unwrap();
    for (part, value, expected) in [
        ("bn.running_var", -1.0, "bn.running_var has -1; it must be above -0.001"),
        ("conv.weight", 3e38, "conv.weight, times the factor of"),
        ("bn.running_mean", 3e38, "bn.bias, minus the scaled Conv2d_1a_3x3.bn.running_mean"),
    ] {
        let name = format!("Conv2d_1a_3x3.{part}");
        let good = weights[&name].clone();
        weights.insert(name.clone(), good.affine(0.0, value).unwrap());
        let found = message(&weights);
        assert!(found.contains(expected) && found.contains(".safetensors: "), "{found}");
        weights.insert(name, good);
    }
}
