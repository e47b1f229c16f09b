/// The part of a data set to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Split {
    /// The images to train on.
    Train,
    /// The images held back for evaluation.
    Test,
}
