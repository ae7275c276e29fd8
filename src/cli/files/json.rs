//! JSON files: an object a line, or one document with a list in it, whose elements are handed over
//! as they come.

use std::{cell::RefCell, fmt, io::Read};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::Ended;

/// The fields under which providers put their lists, and ours.
const LISTS: [&str; 9] =
    ["SuppressedDestinationSummaries", "items", "Suppressions", "results", "recipients", "members", "entries", "data", "emails"];

/// How JSON is laid out.
pub(super) enum Shape {
    /// An object a line.
    Lines,
    /// One document, or several, each with a list in it.
    Document,
}

/// The fields that an entry has its address in.
const ADDRESSES: [&str; 6] = ["email", "emailAddress", "EmailAddress", "email_address", "address", "recipient"];

/// The shape of a file that begins like this; none when it is no JSON. `is_all` says that the file
/// ends there.
pub(super) fn shape(head: &[u8], is_all: bool) -> Option<Shape> {
    let text = head.trim_ascii_start();
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii_end();
    let is_cut = !is_all && !text.contains(&b'\n');
    match text.first()? {
        b'[' => Some(Shape::Document),
        b'{' => {
            let is_whole = line.ends_with(b"}") && !is_cut;
            let has_list = serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|value| {
                let is_entry = ADDRESSES.iter().any(|name| value.get(name).is_some());
                !is_entry && LISTS.iter().any(|name| value.get(name).is_some_and(serde_json::Value::is_array))
            });
            Some(if is_whole && !has_list { Shape::Lines } else { Shape::Document })
        }
        _ => None,
    }
}

/// One element of a list.
pub(super) enum Element {
    /// The fields of an object as texts; a bare text is the field `email`.
    Cells {
        /// The names of the fields, as they come.
        names: Vec<String>,
        /// Their values.
        texts: Vec<String>,
    },
    /// Neither an object nor a text.
    Other,
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object or a text")
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Cells { names: vec!["email".to_owned()], texts: vec![text.to_owned()] })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Element, A::Error> {
                let (mut names, mut texts) = (Vec::new(), Vec::new());
                while let Some((name, Text(text))) = map.next_entry()? {
                    names.push(name);
                    texts.push(text);
                }
                Ok(Element::Cells { names, texts })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Element::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_unit<E>(self) -> Result<Element, E> {
                Ok(Element::Other)
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

/// A value as a cell of a table would have it: the values of a list with commas, nothing for an
/// object.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Text, E> {
                Ok(Text(value.to_string()))
            }

            fn visit_unit<E>(self) -> Result<Text, E> {
                Ok(Text(String::new()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Text, A::Error> {
                let mut texts = Vec::new();
                while let Some(Text(text)) = seq.next_element()? {
                    texts.push(text);
                }
                Ok(Text(texts.join(",")))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Text(String::new()))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

/// Hands over every element of the lists in a file of documents.
pub(super) fn document(reader: impl Read, mut take: impl FnMut(Element) -> Result<(), Ended>) -> Result<(), Ended> {
    let mut deserializer = serde_json::Deserializer::from_reader(reader);
    let ended = RefCell::new(None);
    let mut lists = 0;
    loop {
        if deserializer.end().is_ok() {
            break;
        }
        let document = Document { take: &mut take, ended: &ended, lists: &mut lists };
        if let Err(error) = document.deserialize(&mut deserializer) {
            return Err(ended.take().unwrap_or_else(|| Ended::Broken(format!("is not valid JSON ({error})"))));
        }
    }
    if lists == 0 { Err(Ended::Broken("has no list of entries in it".to_owned())) } else { Ok(()) }
}

/// A list, or an object with a list in one of its fields.
struct Document<'a> {
    take: &'a mut dyn FnMut(Element) -> Result<(), Ended>,
    /// Why the taker wants no more; the parser only hears that it is so.
    ended: &'a RefCell<Option<Ended>>,
    lists: &'a mut u64,
}

impl<'de> DeserializeSeed<'de> for Document<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Document<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list, or an object with a list in it")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        *self.lists += 1;
        while let Some(element) = seq.next_element()? {
            if let Err(ended) = (self.take)(element) {
                *self.ended.borrow_mut() = Some(ended);
                return Err(A::Error::custom("no more is wanted"));
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if LISTS.contains(&name.as_str()) {
                map.next_value_seed(Document { take: &mut *self.take, ended: self.ended, lists: &mut *self.lists })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}
