/// The counts that updates change. The device keeps them if it decides which updates are skipped; otherwise the host
/// does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Counters {
    /// Number of updates of the weights.
    pub updates: u64,
    /// Number of updates of the average.
    pub average_updates: u64,
    /// The factor of the loss's gradient in the next update.
    pub scale: f64,
    /// Number of updates since the last overflow or growth of the scale.
    pub good_updates: u64,
    /// Number of updates that were skipped because the gradient was not finite.
    pub skipped: u64,
    /// Whether the gradient was not finite at the smallest scale.
    pub exhausted: bool,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            updates: 0,
            average_updates: 0,
            scale: 1.0,
            good_updates: 0,
            skipped: 0,
            exhausted: false,
        }
    }
}
