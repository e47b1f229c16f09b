//! An interpreter of pickles that runs no code. It knows the few classes and functions of which the files of PyTorch
//! consist. The results of all others are [`Object::Unknown`].
//!
//! The format is that of the Python module `pickletools`: a program for a machine with a stack, and a memo of values by
//! number. Protocols 2 to 5 are read, except for the operations that such files do not have.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::in_short;

/// The greatest number of operations, and so of values. A tensor of a state dict takes about fifty.
const MOST: usize = 1 << 20;

/// The reason why a pickle cannot be read.
pub(super) type Result<T> = std::result::Result<T, String>;

/// A value. It borrows texts from the pickle, and refers to objects by their numbers, so that values can be copied and
/// no value contains another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Text(&'a str),
    /// A class or a function.
    Global(Global<'a>),
    /// The number of an object.
    Object(usize),
    /// The beginning of a list of arguments on the stack.
    Mark,
}

/// The module and the name of a class or a function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Global<'a> {
    pub module: &'a str,
    pub name: &'a str,
}

impl fmt::Display for Global<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", in_short(self.module), in_short(self.name))
    }
}

/// An object that values refer to.
#[derive(Debug)]
pub(super) enum Object<'a> {
    /// A tuple or a list.
    Sequence(Vec<Value<'a>>),
    /// A dictionary or an `OrderedDict`.
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// An object outside of the pickle, by its identifier: a storage.
    Persistent(Value<'a>),
    /// A call of a function that rebuilds a tensor, with its arguments.
    Tensor(Value<'a>),
    /// The result of any other call. The call was not made.
    Unknown(Global<'a>),
}

/// The result of a pickle.
pub(super) struct Pickled<'a> {
    pub value: Value<'a>,
    objects: Vec<Object<'a>>,
}

impl<'a> Pickled<'a> {
    /// Interprets the pickle at the beginning of `bytes`. Returns its result and the bytes after it.
    ///
    /// # Errors
    /// Returns an error if the pickle is incomplete, if it has an operation that the files of PyTorch do not have, or
    /// if it has too many objects.
    pub fn read(bytes: &'a [u8]) -> Result<(Self, &'a [u8])> {
        let mut machine = Machine { rest: bytes, ..Machine::default() };
        while machine.step()? {}
        let value = machine.pop()?;
        Ok((Self { value, objects: machine.objects }, machine.rest))
    }

    /// All objects.
    pub fn objects(&self) -> impl Iterator<Item = &Object<'a>> {
        self.objects.iter()
    }

    /// The object to which a value refers.
    pub fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Object(number) => self.objects.get(number),
            _ => None,
        }
    }

    /// The values of a tuple or a list.
    pub fn sequence(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.object(value) {
            Some(Object::Sequence(values)) => Some(values),
            _ => None,
        }
    }

    /// The entries of a dictionary.
    pub fn dict(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.object(value) {
            Some(Object::Dict(entries)) => Some(entries),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value<'a>>,
    memo: BTreeMap<usize, Value<'a>>,
    objects: Vec<Object<'a>>,
    operations: usize,
}

impl<'a> Machine<'a> {
    /// Performs an operation. Returns whether the pickle goes on.
    fn step(&mut self) -> Result<bool> {
        self.operations += 1;
        if self.operations > MOST {
            return Err(format!("the pickle has more than {MOST} operations"));
        }
        let [operation] = self.array()?;
        match operation {
            // The protocol, and the length of the following part.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return Ok(false),
            b'(' => self.stack.push(Value::Mark),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.above_mark()?),
            b'2' => self.stack.push(self.top()?),

            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool(operation == 0x88)),
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(number.into()));
            }
            b'K' | b'M' => {
                let number = self.length(if operation == b'K' { 1 } else { 2 })?;
                self.stack.push(Value::Int(number as i64));
            }
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Float);
            }
            // Texts, of Python 2 as well, and bytes, of which no tensor needs the content.
            b'X' | b'T' => self.text(4)?,
            0x8c | b'U' => self.text(1)?,
            0x8d => self.text(8)?,
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e => self.bytes(8)?,

            b')' => self.sequence(vec![]),
            0x85 => self.last(1)?,
            0x86 => self.last(2)?,
            0x87 => self.last(3)?,
            b't' | b'l' => {
                let values = self.above_mark()?;
                self.sequence(values);
            }
            b']' => self.sequence(vec![]),
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' => {
                let values = self.above_mark()?;
                self.append(values)?;
            }
            b'}' => self.create(Object::Dict(vec![])),
            b'd' => {
                let values = self.above_mark()?;
                self.create(Object::Dict(vec![]));
                self.set(&values)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            b'u' => {
                let values = self.above_mark()?;
                self.set(&values)?;
            }

            b'q' | b'r' => {
                let number = self.length(if operation == b'q' { 1 } else { 4 })?;
                self.remember(number)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' | b'j' => {
                let number = self.length(if operation == b'h' { 1 } else { 4 })?;
                let value = self.memo.get(&number).copied();
                self.stack.push(value.ok_or("the pickle uses a value that it does not have")?);
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(Global { module, name }));
            }
            0x93 => match [self.pop()?, self.pop()?] {
                [Value::Text(name), Value::Text(module)] => {
                    self.stack.push(Value::Global(Global { module, name }));
                }
                _ => return Err("the name of a class is not a text".into()),
            },
            b'Q' => {
                let identifier = self.pop()?;
                self.create(Object::Persistent(identifier));
            }
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                self.call(arguments)?;
            }
            // The attributes of an object, such as the versions of the layers of a state dict.
            b'b' => drop(self.pop()?),
            operation => {
                return Err(format!(
                    "the pickle has operation {operation:#04x}, which is not read"
                ));
            }
        }
        Ok(true)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or("the pickle is incomplete")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or("the pickle is incomplete")?;
        self.rest = rest;
        Ok(*taken)
    }

    /// Reads a length of this many bytes.
    fn length(&mut self, bytes: usize) -> Result<usize> {
        let digits = self.take(bytes)?.iter().rev();
        let length = digits.fold(0, |length: u64, &digit| length << 8 | u64::from(digit));
        usize::try_from(length).map_err(|_| "the pickle is incomplete".into())
    }

    /// Reads an integer in two's complement, after its length, which has this many bytes.
    fn long(&mut self, digits: usize) -> Result<()> {
        let length = self.length(digits)?;
        let bytes = self.take(length)?;
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut digits = [if negative { 0xff } else { 0 }; 8];
        // Seeds of random numbers may be longer. No tensor needs them.
        let Some(low) = digits.get_mut(..length) else {
            self.stack.push(Value::None);
            return Ok(());
        };
        low.copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(digits)));
        Ok(())
    }

    fn text(&mut self, digits: usize) -> Result<()> {
        let length = self.length(digits)?;
        let text = str::from_utf8(self.take(length)?);
        // Names of tensors are valid texts. Others are of no use.
        self.stack.push(text.map_or(Value::None, Value::Text));
        Ok(())
    }

    fn bytes(&mut self, digits: usize) -> Result<()> {
        let length = self.length(digits)?;
        self.take(length)?;
        self.stack.push(Value::None);
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str> {
        let end = self.rest.iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or("the pickle is incomplete")?)?;
        self.take(1)?;
        str::from_utf8(line).map_err(|_| "the name of a class is not a text".into())
    }

    fn top(&self) -> Result<Value<'a>> {
        self.stack.last().copied().ok_or_else(|| "the stack of the pickle is empty".into())
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        self.stack.pop().ok_or_else(|| "the stack of the pickle is empty".into())
    }

    /// Removes the values above the last mark, and the mark.
    fn above_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.stack.iter().rposition(|value| *value == Value::Mark);
        let mark = mark.ok_or("the stack of the pickle has no mark")?;
        let values = self.stack.split_off(mark + 1);
        self.stack.truncate(mark);
        Ok(values)
    }

    fn create(&mut self, object: Object<'a>) {
        self.stack.push(Value::Object(self.objects.len()));
        self.objects.push(object);
    }

    fn sequence(&mut self, values: Vec<Value<'a>>) {
        self.create(Object::Sequence(values));
    }

    /// Creates a tuple of the last values of the stack.
    fn last(&mut self, count: usize) -> Result<()> {
        let first = self.stack.len().checked_sub(count);
        let values = self.stack.split_off(first.ok_or("the stack of the pickle is empty")?);
        self.sequence(values);
        Ok(())
    }

    /// The object at the top of the stack.
    fn object(&mut self) -> Result<Option<&mut Object<'a>>> {
        match self.top()? {
            Value::Object(number) => Ok(self.objects.get_mut(number)),
            _ => Ok(None),
        }
    }

    fn append(&mut self, values: Vec<Value<'a>>) -> Result<()> {
        match self.object()? {
            Some(Object::Sequence(list)) => list.extend(values),
            Some(Object::Unknown(_)) => {}
            _ => return Err("the pickle appends to an object that is not a list".into()),
        }
        Ok(())
    }

    /// Sets the entries of the dictionary at the top of the stack: a key, its value, and so on.
    fn set(&mut self, entries: &[Value<'a>]) -> Result<()> {
        let (pairs, rest) = entries.as_chunks();
        match self.object()? {
            Some(Object::Dict(dict)) if rest.is_empty() => {
                dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
            }
            Some(Object::Unknown(_)) => {}
            _ => return Err("the pickle sets entries of an object that is not a dictionary".into()),
        }
        Ok(())
    }

    fn remember(&mut self, number: usize) -> Result<()> {
        self.memo.insert(number, self.top()?);
        Ok(())
    }

    /// Replaces the function at the top of the stack by its result.
    fn call(&mut self, arguments: Value<'a>) -> Result<()> {
        let function = match self.pop()? {
            Value::Global(function) => function,
            Value::Object(number) => match self.objects.get(number) {
                // A method of an unknown object.
                Some(&Object::Unknown(function)) => function,
                _ => return Err("the pickle calls an object that is not a function".into()),
            },
            _ => return Err("the pickle calls a value that is not a function".into()),
        };
        let values = match arguments {
            Value::Object(number) => self.objects.get(number),
            _ => None,
        };
        let Some(Object::Sequence(values)) = values else {
            return Err("the arguments of a function in the pickle are not a tuple".into());
        };
        let result = match (function.module, function.name, &**values) {
            ("collections", "OrderedDict", []) => Object::Dict(vec![]),
            ("torch._utils", "_rebuild_tensor_v2", _) => Object::Tensor(arguments),
            ("torch._utils", "_rebuild_parameter", &[tensor, ..]) => {
                self.stack.push(tensor);
                return Ok(());
            }
            _ => Object::Unknown(function),
        };
        self.create(result);
        Ok(())
    }
}
