//! The tensors of a pickle: their names, and where their numbers are.

use std::borrow::Cow;

use safetensors::Dtype;

use super::pickle::{Object, Pickled, Result, Value};
use crate::error::{in_short, list_in_short};

/// The greatest depth of nested dictionaries.
const MOST_DEPTH: usize = 16;
/// The greatest length of a name in bytes.
const MOST_NAME: usize = 512;
/// The greatest number of values in all dictionaries. A pickle can refer to a dictionary many times.
const MOST_VALUES: usize = 1 << 18;
/// The greatest number of dimensions.
const MOST_DIMENSIONS: usize = 16;

/// The classes of storages, with the numbers of bytes of a value, and with the type if it is a floating-point type that
/// the crate reads.
const CLASSES: [(&str, usize, Option<Dtype>); 10] = [
    ("FloatStorage", 4, Some(Dtype::F32)),
    ("HalfStorage", 2, Some(Dtype::F16)),
    ("BFloat16Storage", 2, Some(Dtype::BF16)),
    ("DoubleStorage", 8, Some(Dtype::F64)),
    ("LongStorage", 8, None),
    ("IntStorage", 4, None),
    ("ShortStorage", 2, None),
    ("CharStorage", 1, None),
    ("ByteStorage", 1, None),
    ("BoolStorage", 1, None),
];

/// A storage: numbers of one type, which tensors view.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage<'a> {
    /// Its name in the file.
    pub key: &'a str,
    /// The number of values.
    pub len: usize,
    /// The number of bytes of a value.
    pub width: usize,
    /// The type of the values. `None` for integers and booleans.
    pub dtype: Option<Dtype>,
}

impl<'a> Storage<'a> {
    /// Parses an identifier: the word `storage`, the class, the key, the device, the number of values, and nothing, or
    /// `None` in files of the earlier format.
    ///
    /// # Errors
    /// Returns an error if it is not an identifier of this form, or names the class if it is not known.
    pub fn parse(pickled: &Pickled<'a>, identifier: Value<'a>) -> Result<Self> {
        let wrong = "the pickle refers to something other than a storage";
        let (class, key, len) = match pickled.sequence(identifier).ok_or(wrong)? {
            &[
                Value::Text("storage"),
                Value::Global(class),
                Value::Text(key),
                _,
                Value::Int(len),
            ]
            | &[
                Value::Text("storage"),
                Value::Global(class),
                Value::Text(key),
                _,
                Value::Int(len),
                Value::None,
            ] => (class, key, len),
            _ => return Err(wrong.into()),
        };
        let known =
            CLASSES.iter().find(|(name, ..)| class.module == "torch" && class.name == *name);
        let Some(&(_, width, dtype)) = known else {
            return Err(format!("a tensor has a storage of class {class}, which is not read"));
        };
        let len = usize::try_from(len).map_err(|_| "a storage has a negative length")?;
        Ok(Self { key, len, width, dtype })
    }

    /// The storages to which the pickle refers.
    ///
    /// # Errors
    /// Returns the errors of [`parse`](Self::parse).
    pub fn all(pickled: &Pickled<'a>) -> impl Iterator<Item = Result<Self>> {
        pickled.objects().filter_map(|object| match object {
            Object::Persistent(identifier) => Some(Self::parse(pickled, *identifier)),
            _ => None,
        })
    }
}

/// A tensor: a view of a storage.
pub(super) struct View<'a> {
    pub storage: Storage<'a>,
    pub shape: Vec<usize>,
    offset: usize,
    strides: Vec<usize>,
    /// The number of values.
    len: usize,
}

impl<'a> View<'a> {
    /// Parses the arguments of the function that rebuilds a tensor: the storage, the offset in it, the shape, the
    /// strides, and others that have no effect on the numbers.
    ///
    /// # Errors
    /// Returns an error if the arguments have another form, or if the view exceeds its storage.
    pub fn parse(pickled: &Pickled<'a>, arguments: Value<'a>) -> Result<Self> {
        let wrong = "the arguments of a tensor have another form";
        let &[storage, Value::Int(offset), shape, strides, ..] =
            pickled.sequence(arguments).ok_or(wrong)?
        else {
            return Err(wrong.into());
        };
        let Some(&Object::Persistent(identifier)) = pickled.object(storage) else {
            return Err(wrong.into());
        };
        let numbers = |value| {
            let values = pickled.sequence(value)?;
            let number = |value: &Value<'_>| match *value {
                Value::Int(number) => usize::try_from(number).ok(),
                _ => None,
            };
            let few = values.len() <= MOST_DIMENSIONS;
            few.then(|| values.iter().map(number).collect::<Option<Vec<usize>>>())?
        };
        let storage = Storage::parse(pickled, identifier)?;
        let offset = usize::try_from(offset).map_err(|_| wrong)?;
        let (shape, strides) = (numbers(shape).ok_or(wrong)?, numbers(strides).ok_or(wrong)?);
        if shape.len() != strides.len() {
            return Err(wrong.into());
        }
        // Without the sizes of 0, so that no product of sizes overflows anywhere.
        let len = shape.iter().try_fold(1usize, |len, &size| len.checked_mul(size.max(1)));
        let len = len.map(|len| if shape.contains(&0) { 0 } else { len });
        let last = |at: usize, (&size, &stride): (&usize, &usize)| {
            at.checked_add((size - 1).checked_mul(stride)?)
        };
        let end = match len {
            Some(0) => Some(0),
            Some(_) => shape
                .iter()
                .zip(&strides)
                .try_fold(offset, last)
                .and_then(|last| last.checked_add(1)),
            None => None,
        };
        match (len, end) {
            (Some(len), Some(end)) if end <= storage.len => {
                Ok(Self { storage, shape, offset, strides, len })
            }
            _ => Err(format!(
                "a view of shape {} exceeds its storage of {} values",
                list_in_short(&shape),
                storage.len
            )),
        }
    }

    /// The number of bytes of all values.
    ///
    /// # Errors
    /// Returns an error if it does not fit the address space.
    pub fn size(&self) -> Result<usize> {
        self.len.checked_mul(self.storage.width).ok_or_else(|| "a tensor is too large".into())
    }

    /// Returns the bytes of the values in C order. `storage` has the bytes of the storage.
    pub fn values<'s>(&self, storage: &'s [u8]) -> Cow<'s, [u8]> {
        let width = self.storage.width;
        if self.len == 0 {
            return Cow::Borrowed(&[]);
        }
        let mut dense = 1;
        let is_dense = self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == dense;
            dense *= size;
            fits
        });
        let start = self.offset * width;
        if is_dense {
            return Cow::Borrowed(&storage[start..start + self.len * width]);
        }
        let mut values = Vec::new();
        let mut index = vec![0; self.shape.len()];
        for _ in 0..self.len {
            let at = index.iter().zip(&self.strides).fold(self.offset, |at, (i, by)| at + i * by);
            values.extend_from_slice(&storage[at * width..][..width]);
            // Counts like the digits of a number.
            for (i, &size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < size {
                    break;
                }
                *i = 0;
            }
        }
        Cow::Owned(values)
    }
}

/// Returns the arguments of the tensors whose names begin with `prefix`, by their names without the prefix, in the
/// order of the pickle. The name of a tensor consists of the keys of all dictionaries and lists that contain it, with
/// dots between them.
///
/// # Errors
/// Returns an error if a value of such a name is the result of a call that was not made, and names the function.
/// Returns an error if there is no dictionary, or if there are too many values.
pub(super) fn named<'a>(pickled: &Pickled<'a>, prefix: &str) -> Result<Vec<(String, Value<'a>)>> {
    if let Some(Object::Unknown(function)) = pickled.object(pickled.value) {
        return Err(format!("the file calls {function}, which is not run"));
    }
    if pickled.dict(pickled.value).is_none() {
        return Err("the file holds no dictionary of tensors".into());
    }
    let mut names = Names { pickled, prefix, found: vec![], values: 0 };
    names.collect(String::new(), pickled.value, 0)?;
    Ok(names.found)
}

struct Names<'p, 'a> {
    pickled: &'p Pickled<'a>,
    prefix: &'p str,
    found: Vec<(String, Value<'a>)>,
    /// The number of values so far.
    values: usize,
}

impl<'a> Names<'_, 'a> {
    fn collect(&mut self, name: String, value: Value<'a>, depth: usize) -> Result<()> {
        self.values += 1;
        if self.values > MOST_VALUES {
            return Err(format!("the file has more than {MOST_VALUES} values"));
        }
        let wanted = name.strip_prefix(self.prefix);
        match self.pickled.object(value) {
            Some(&Object::Tensor(arguments)) => {
                self.found.extend(wanted.map(|wanted| (wanted.to_owned(), arguments)));
            }
            Some(Object::Unknown(function)) if wanted.is_some() => {
                let name = in_short(&name);
                return Err(format!("{name} is made by {function}, which is not run"));
            }
            Some(Object::Dict(entries)) => {
                for &(key, value) in entries {
                    match key {
                        Value::Text(key) => self.enter(&name, key, value, depth)?,
                        Value::Int(key) => self.enter(&name, &key.to_string(), value, depth)?,
                        _ => {}
                    }
                }
            }
            Some(Object::Sequence(values)) => {
                for (index, &value) in values.iter().enumerate() {
                    self.enter(&name, &index.to_string(), value, depth)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Collects the entry `key` of the value `name`, if its names can begin with the prefix.
    fn enter(&mut self, name: &str, key: &str, value: Value<'a>, depth: usize) -> Result<()> {
        if name.len() + key.len() > MOST_NAME || depth > MOST_DEPTH {
            let name = in_short(name);
            return Err(format!("{name} has names of more than {MOST_NAME} bytes, or is too deep"));
        }
        let name = if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        let common = name.len().min(self.prefix.len());
        match name.as_bytes()[..common] == self.prefix.as_bytes()[..common] {
            true => self.collect(name, value, depth + 1),
            false => Ok(()),
        }
    }
}
