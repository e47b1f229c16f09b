//! The format of event files. A file is a sequence of records, as TensorFlow's `TFRecordWriter` writes them. A record
//! holds a protocol buffer, the message `Event` of TensorFlow's `event.proto` and `summary.proto`.

use crc::{CRC_32_ISCSI, Crc};

use crate::train::{Picture, Value};

/// The version of the format. Readers discard values from before a [restart](Content::Restart) since version 2.
const VERSION: &[u8] = b"brain.Event:2";

/// The content of an event, except for its time and its step.
#[derive(Debug, Clone, Copy)]
pub(super) enum Content<'a> {
    /// The beginning of a file.
    Version,
    /// A run that continues at this step. Earlier values of this step and of later steps are discarded.
    Restart,
    /// Values by name.
    Values(&'a [(&'a str, &'a Value)]),
}

/// Encodes an event as a record. The time is in seconds since 1970.
pub(super) fn record(wall_time: f64, step: u64, content: Content<'_>) -> Vec<u8> {
    let event = Message::default().double(1, wall_time).integer(2, step);
    let event = match content {
        Content::Version => event.bytes(3, VERSION),
        // SessionLog::START.
        Content::Restart => event.message(7, Message::default().integer(1, 1)),
        Content::Values(values) => {
            let summary = Message::default();
            let summary = values
                .iter()
                .fold(summary, |summary, (name, value)| summary.message(1, named(name, value)));
            event.message(5, summary)
        }
    };
    framed(&event.0)
}

/// Encodes a `Summary.Value`.
fn named(name: &str, value: &Value) -> Message {
    let named = Message::default().bytes(1, name.as_bytes());
    match value {
        Value::Scalar(value) => named.float(2, *value as f32),
        Value::Picture(Picture { width, height, channels, png }) => {
            let picture = Message::default().integer(1, (*height).into());
            let picture = picture.integer(2, (*width).into()).integer(3, (*channels).into());
            named.message(4, picture.bytes(4, png))
        }
    }
}

/// Encodes a record: the length and its checksum, the content and its checksum.
fn framed(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), content, &checksum(content)].concat()
}

/// The masked CRC-32C of bytes: rotated, and increased by a constant.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
    CRC.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A message of the protocol buffer encoding. Fields are added in the order of their numbers.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    /// Adds an integer. The default 0 is left out.
    fn integer(self, field: u8, value: u64) -> Self {
        if value == 0 { self } else { self.key(field, 0).varint(value) }
    }

    fn double(self, field: u8, value: f64) -> Self {
        self.key(field, 1).raw(&value.to_le_bytes())
    }

    fn float(self, field: u8, value: f32) -> Self {
        self.key(field, 5).raw(&value.to_le_bytes())
    }

    fn bytes(self, field: u8, value: &[u8]) -> Self {
        self.key(field, 2).varint(value.len() as u64).raw(value)
    }

    fn message(self, field: u8, message: Message) -> Self {
        self.bytes(field, &message.0)
    }

    /// Adds the number of a field, which is less than 16, and the type of its encoding.
    fn key(self, field: u8, wire_type: u8) -> Self {
        self.raw(&[field << 3 | wire_type])
    }

    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}
