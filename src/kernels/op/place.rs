/// Some channels of a map, to which an operation writes its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The first of the channels.
    pub first: usize,
    /// The number of channels of the map.
    pub of: usize,
}

impl Place {
    /// All channels of a map of `channels` channels.
    pub(crate) fn whole(channels: usize) -> Self {
        Self { first: 0, of: channels }
    }
}
