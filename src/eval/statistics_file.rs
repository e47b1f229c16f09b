use std::path::Path;

use super::frechet::Gaussian;
use super::npz;
use crate::error::Result;
use crate::model::tensor_file::open_regular;
use crate::zip::Archive;

impl Gaussian {
    /// Reads a statistics file: an archive of NumPy (`.npz`) with the arrays `mu` (features) and `sigma` (features,
    /// features). pytorch-fid and the reference files of guided-diffusion have this format. Other arrays, such as the
    /// images of the latter, are not read.
    ///
    /// The numbers are float64 or float32 in C order. Entries are stored or deflated. A covariance in float32 has a
    /// larger [rounding](Self::frechet_distance): variances below 5e-7 of the largest count as 0.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, if it is damaged or of another format, if an array is missing or of
    /// another shape, if a number is not finite, or if the covariance is not symmetric up to 1e-6 of its deviations.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::named(path.as_ref(), "mu", "sigma")
    }

    /// Reads the statistics of spatial features, `mu_s` and `sigma_s`, of a file of guided-diffusion. Their distance is
    /// the sFID (Nash et al. 2021).
    ///
    /// # Errors
    /// Returns the errors of [`read`](Self::read).
    pub fn read_spatial(path: impl AsRef<Path>) -> Result<Self> {
        Self::named(path.as_ref(), "mu_s", "sigma_s")
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

    fn named(path: &Path, mean: &str, covariance: &str) -> Result<Self> {
        let archive = Archive::new(path, open_regular(path)?.0)?;
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
        let create = if sigma.is_f32 { Self::from_f32 } else { Self::new };
        create(mean.values, sigma.values).map_err(|e| archive.damaged(e.to_string()))
    }
}

/// Replaces a covariance that is symmetric up to rounding by a symmetric one.
fn symmetric(covariance: &mut [f64], n: usize) -> std::result::Result<(), String> {
    for i in 0..n {
        for j in 0..i {
            let (below, above) = (covariance[i * n + j], covariance[j * n + i]);
            let scale = (covariance[i * n + i].abs() * covariance[j * n + j].abs()).sqrt();
            if (below - above).abs() > 1e-6 * scale {
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
