use std::fs::File;
use std::io::Seek;
use std::path::Path;

use super::frechet::{F32_ROUNDING, Gaussian};
use super::npz;
use crate::error::{Error, Result};
use crate::files;
use crate::model::tensor_file::open_regular;
use crate::zip::Archive;

/// The largest difference of two elements that should be equal, relative to their deviations. The sums of a covariance
/// may be in f32, and each of the two in another order.
const ASYMMETRY: f64 = 100.0 * F32_ROUNDING;

impl Gaussian {
    /// Reads a statistics file: an archive of NumPy (`.npz`) with the arrays `mu` (features) and `sigma` (features,
    /// features). pytorch-fid and the reference files of guided-diffusion have this format. Other arrays, such as the
    /// images of the latter, are not read.
    ///
    /// The numbers are float64 or float32 in C order. Entries are stored or deflated. A covariance in float32 has a
    /// larger [rounding](Self::frechet_distance): variances below 2.4e-7 of the largest count as 0. So does a
    /// covariance in float64 that is indefinite beyond its own rounding, because many programs compute in float32 and
    /// save in float64. What remains of either must be 0 up to a hundred times this limit, which allows for the
    /// rounding of a hundred additions.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if it is damaged or of another format. Returns an error if an
    /// array is missing or of another shape, if a number is not finite, or if the covariance is not symmetric up to
    /// 2.4e-5 of its deviations.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::named(path, open_regular(path)?.0, "mu", "sigma")
    }

    /// Reads a statistics file, and computes its SHA-256 in hexadecimal, by which a report of figures names the
    /// statistics. Both are of the same bytes, even if another program replaces the file.
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read).
    pub fn read_with_sha256(path: impl AsRef<Path>) -> Result<(Self, String)> {
        let path = path.as_ref();
        let (mut file, _) = open_regular(path)?;
        let sha256 = files::sha256(&file).map_err(Error::io(path))?;
        file.rewind().map_err(Error::io(path))?;
        Ok((Self::named(path, file, "mu", "sigma")?, sha256))
    }

    /// Reads the statistics of spatial features, `mu_s` and `sigma_s`, of a file of guided-diffusion. Their distance is
    /// the sFID (Nash et al. 2021).
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read).
    pub fn read_spatial(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::named(path, open_regular(path)?.0, "mu_s", "sigma_s")
    }

    /// Writes a statistics file that [`read`](Self::read), pytorch-fid and guided-diffusion read: `mu` and `sigma` in
    /// float64. The file is complete or does not exist.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let n = self.mean().len();
        let arrays = [("mu", &[n][..], self.mean()), ("sigma", &[n, n], self.covariance())];
        npz::write(path.as_ref(), &arrays)
    }

    fn named(path: &Path, file: File, mean: &str, covariance: &str) -> Result<Self> {
        let archive = Archive::new(path, file)?;
        let array = |name: &str| match npz::array(&archive, name)? {
            Some(array) => Ok(array),
            None => Err(archive.damaged(format!("the array {name} is missing"))),
        };
        let (mean, mut sigma) = (array(mean)?, array(covariance)?);
        let n = mean.values.len();
        if mean.shape != [n] || sigma.shape != [n, n] {
            let found = format!("shapes {:?} and {:?}", mean.shape, sigma.shape);
            return Err(
                archive.damaged(format!("{found} are not those of a mean and a covariance"))
            );
        }
        symmetric(&mut sigma.values, n).map_err(|reason| archive.damaged(reason))?;
        let create = if sigma.is_f32 { Self::from_f32 } else { Self::from_f64 };
        create(mean.values, sigma.values).map_err(|e| archive.damaged(e.to_string()))
    }
}

/// Replaces a covariance that is symmetric up to rounding by a symmetric one.
fn symmetric(covariance: &mut [f64], n: usize) -> std::result::Result<(), String> {
    for i in 0..n {
        for j in 0..i {
            let (below, above) = (covariance[i * n + j], covariance[j * n + i]);
            let scale = (covariance[i * n + i].abs() * covariance[j * n + j].abs()).sqrt();
            if (below - above).abs() > ASYMMETRY * scale {
                return Err(format!(
                    "the covariance is not symmetric: {below} and {above} at {i}, {j}"
                ));
            }
            let mean = below + (above - below) / 2.0;
            (covariance[i * n + j], covariance[j * n + i]) = (mean, mean);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 60;

    /// The mean and the covariance of 40 points of 60 features, with sums in `T`. The sums of `i, j` and `j, i` have
    /// opposite orders.
    fn statistics<T>(seed: usize) -> [Vec<f64>; 2]
    where
        T: Copy + From<f32> + Into<f64> + std::ops::Add<Output = T> + std::ops::Mul<Output = T>,
    {
        let value = |k: usize, i: usize| ((seed + k * SIZE + i) as f32).sin() * 43_758.547 % 1.0;
        let points: Vec<Vec<f32>> =
            (0..40).map(|k| (0..SIZE).map(|i| value(k, i)).collect()).collect();
        let mean = |i: usize| points.iter().map(|p| f64::from(p[i])).sum::<f64>() / 40.0;
        let mean: Vec<f64> = (0..SIZE).map(mean).collect();
        let product = |point: &Vec<f32>, i: usize, j: usize| {
            let apart = |i: usize| T::from((f64::from(point[i]) - mean[i]) as f32);
            apart(i) * apart(j)
        };
        let zero = T::from(0.0);
        let sum = |(i, j): (usize, usize)| match i < j {
            true => points.iter().fold(zero, |sum, p| sum + product(p, i, j)),
            false => points.iter().rev().fold(zero, |sum, p| sum + product(p, i, j)),
        };
        let all = (0..SIZE).flat_map(|i| (0..SIZE).map(move |j| (i, j)));
        let covariance = all.map(|at| sum(at).into() / 39.0).collect();
        [mean, covariance]
    }

    fn read([mean, covariance]: &[Vec<f64>; 2]) -> Result<Gaussian> {
        let dir = tempfile::tempdir().unwrap();
        let (path, n) = (dir.path().join("statistics.npz"), mean.len());
        npz::write(&path, &[("mu", &[n], mean), ("sigma", &[n, n], covariance)])?;
        Gaussian::read(path)
    }

    /// The covariance has rank 39, so that sums in f32 make it indefinite.
    #[test]
    fn covariances_that_were_computed_in_f32_have_the_distance_of_exact_ones() {
        let distance = |a: &Gaussian, b: &Gaussian| a.frechet_distance(b).unwrap();
        let exact = [0, 5000].map(|seed| read(&statistics::<f64>(seed)).unwrap());
        let rounded = [0, 5000].map(statistics::<f32>);
        assert!((0..SIZE).any(|i| {
            (0..i).any(|j| rounded[0][1][i * SIZE + j] != rounded[0][1][j * SIZE + i])
        }));
        let [a, b] = rounded.map(|statistics| read(&statistics).unwrap());
        let expected = distance(&exact[0], &exact[1]);
        let found = distance(&a, &b);
        assert!((found / expected - 1.0).abs() < 1e-4, "{found}, not {expected}");
        // Statistics of the crate itself are in f64, and must be exact.
        let own = Gaussian::new(a.mean().to_vec(), a.covariance().to_vec()).unwrap();
        let message = own.frechet_distance(&b).unwrap_err().to_string();
        assert!(message.contains("it must be positive semi-definite"), "{message}");
    }

    #[test]
    fn what_rounding_in_f32_does_not_explain_is_an_error() {
        let mean = vec![0.0; 2];
        let file = |a, b, c| read(&[mean.clone(), vec![1.0, a, b, c]]);
        assert!(file(0.5, 0.5 + 1e-5, 1.0).is_ok());
        let message = file(0.5, 0.5 + 1e-4, 1.0).unwrap_err().to_string();
        assert!(message.contains("the covariance is not symmetric"), "{message}");
        let one = Gaussian::new(mean.clone(), vec![1.0, 0.0, 0.0, 1.0]).unwrap();
        assert!(one.frechet_distance(&file(0.0, 0.0, -1e-5).unwrap()).is_ok());
        let indefinite = file(0.0, 0.0, -1e-4).unwrap();
        let message = one.frechet_distance(&indefinite).unwrap_err().to_string();
        assert!(message.contains("it must be positive semi-definite"), "{message}");
    }
}
