use crate::error::{Error, Result};

/// A named value that an observer [published](crate::train::Run::publish) for all observers of a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Published {
    /// The number of updates to which the value belongs.
    pub step: u64,
    /// The name, such as `held_out/loss`. Names with the same part before the first `/` are related. The name of a number
    /// contains a `/`.
    pub name: String,
    /// The value.
    pub value: Value,
}

impl Published {
    /// Returns the value if it is a number.
    pub fn scalar(&self) -> Option<f64> {
        match self.value {
            Value::Scalar(value) => Some(value),
            Value::Picture(_) => None,
        }
    }

    /// # Errors
    /// Returns an error if files of metrics could take the value for a field of a report, such as `loss`.
    pub(super) fn check(&self) -> Result<()> {
        match self.scalar().is_none() || self.name.contains('/') {
            true => Ok(()),
            false => {
                let expected = "a name with a /, such as held_out/loss";
                Err(Error::config("name of a published number", &self.name, expected))
            }
        }
    }
}

/// The value of a [`Published`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// A number. It may be infinite or NaN.
    Scalar(f64),
    /// A picture.
    Picture(Picture),
}

/// A picture as a PNG file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The number of channels: 1 for grey, 3 for red, green and blue; 2 and 4 with opacity as the last one.
    pub channels: u8,
    /// The content of the file.
    pub png: Vec<u8>,
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Scalar(value)
    }
}

impl From<Picture> for Value {
    fn from(picture: Picture) -> Self {
        Self::Picture(picture)
    }
}
