//! JSON files: an object a line, or documents with a list in them, whose elements are cut out as
//! they come and read one by one. So a fault in an element fails that element and no other.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{Refused, records::RECORD_BYTES_MAX};

/// The fields under which providers put their lists, and ours.
const LISTS: [&str; 10] = [
    "SuppressedDestinationSummaries",
    "items",
    "Suppressions",
    "results",
    "recipients",
    "members",
    "contacts",
    "entries",
    "data",
    "emails",
];

/// The fields that an entry has its address in.
const ADDRESSES: [&str; 6] = ["email", "emailAddress", "EmailAddress", "email_address", "address", "recipient"];

/// How deep a list may be.
const DEPTH_MAX: usize = 32;

/// How JSON is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// An object a line.
    Lines,
    /// One document, or several, each with a list in it.
    Document,
}

/// What the start of a file says of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It is no JSON.
    Other,
    /// It is JSON of this shape.
    Json(Shape),
    /// More of it must be seen.
    More,
}

/// Tells the shape of a file that starts with `head`, without blank lines. `is_all` says that
/// nothing comes after it that could be waited for; `column` is the field that the caller has
/// named.
pub(super) fn look(head: &[u8], is_all: bool, column: Option<&str>) -> Look {
    let text = head.trim_ascii_start();
    match text.first() {
        None => return if is_all { Look::Other } else { Look::More },
        Some(b'[') => return Look::Json(Shape::Document),
        Some(b'{') => {}
        Some(_) => return Look::Other,
    }
    let (line, rest) = match text.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&text[..end], &text[end..]),
        None if is_all => (text, &[][..]),
        None => return Look::More,
    };
    // An object that is not whole on its first line is a document.
    let Ok(Element::Object(fields)) = element(line) else {
        let is_whole = line.trim_ascii_end().ends_with(b"}");
        return Look::Json(if is_whole { Shape::Lines } else { Shape::Document });
    };
    let has = |names: &[&str]| fields.iter().any(|field| names.contains(&&*field.name));
    let is_entry = has(&ADDRESSES) || column.is_some_and(|column| has(&[column]));
    let is_list = fields.iter().any(|field| LISTS.contains(&&*field.name) && (field.starts_with('[') || field.starts_with('{')));
    if is_entry {
        return Look::Json(Shape::Lines);
    }
    if is_list {
        return Look::Json(Shape::Document);
    }
    // An object of unknown fields: a line of many, or a document that is none of ours.
    match (rest.trim_ascii().is_empty(), is_all) {
        (false, _) => Look::Json(Shape::Lines),
        (true, true) => Look::Json(Shape::Document),
        (true, false) => Look::More,
    }
}

/// A field of an object, as it is written.
#[derive(Debug)]
pub(super) struct Field<'a> {
    /// Its name; that of a field of an object inside follows the outer one's after a dot.
    pub(super) name: Cow<'a, str>,
    value: Written<'a>,
}

/// A value.
#[derive(Clone, Copy, Debug)]
enum Written<'a> {
    /// A text that stands as it is between its quotes.
    Plain(&'a str),
    /// Any value, as JSON writes it.
    Raw(&'a str),
}

/// One element of a list, or line.
#[derive(Debug)]
pub(super) enum Element<'a> {
    /// An object.
    Object(Vec<Field<'a>>),
    /// A bare text, as it is written.
    Text(Field<'a>),
    /// Anything else.
    Other,
}

/// What is wrong with a text in JSON: half a character of UTF-16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotText;

/// Reads one element.
///
/// # Errors
/// When it is not valid JSON.
pub(super) fn element(bytes: &[u8]) -> Result<Element<'_>, serde_json::Error> {
    let bytes = bytes.trim_ascii();
    match bytes.first() {
        Some(b'{') => {
            // Most objects have nothing but plain texts, and then one look at each byte is enough.
            if let Ok(Object(fields)) = serde_json::from_slice::<Object<'_, true>>(bytes) {
                return Ok(Element::Object(fields));
            }
            let Object(mut fields) = serde_json::from_slice::<Object<'_, false>>(bytes)?;
            if fields.iter().any(|field| field.starts_with('{')) {
                let inner: Vec<_> = fields.iter().flat_map(inner_fields).collect();
                fields.extend(inner);
            }
            Ok(Element::Object(fields))
        }
        Some(b'"') => {
            let raw: &RawValue = serde_json::from_slice(bytes)?;
            Ok(Element::Text(Field { name: Cow::Borrowed("email"), value: Written::Raw(raw.get()) }))
        }
        _ => serde_json::from_slice::<IgnoredAny>(bytes).map(|_| Element::Other),
    }
}

fn inner_fields<'a>(field: &Field<'a>) -> Vec<Field<'a>> {
    let inner = match field.value {
        Written::Raw(raw) if raw.starts_with('{') => serde_json::from_str::<Object<'_, false>>(raw).ok(),
        _ => None,
    };
    let Some(Object(inner)) = inner else { return Vec::new() };
    let name = |name: Cow<'_, str>| Cow::Owned(format!("{}.{name}", field.name));
    inner.into_iter().map(|inner| Field { name: name(inner.name), value: inner.value }).collect()
}

impl<'a> Field<'a> {
    /// Whether the value starts like this in JSON.
    fn starts_with(&self, start: char) -> bool {
        matches!(self.value, Written::Raw(raw) if raw.starts_with(start))
    }

    /// The value as a cell of a table would have it: the values of a list with commas, nothing for
    /// null and for an object, whose own fields stand beside it.
    ///
    /// # Errors
    /// For a text that is none.
    pub(super) fn text(&self) -> Result<Cow<'a, str>, NotText> {
        let raw = match self.value {
            Written::Plain(text) => return Ok(Cow::Borrowed(text)),
            Written::Raw(raw) => raw,
        };
        match raw.as_bytes().first() {
            None | Some(b'n' | b'{') => Ok(Cow::Borrowed("")),
            Some(b'"') if !raw.contains('\\') => Ok(Cow::Borrowed(raw.get(1..raw.len() - 1).unwrap_or_default())),
            Some(b'"') => decoded(raw).map(Cow::Owned),
            Some(b'[') => {
                let values: Vec<&RawValue> = serde_json::from_str(raw).map_err(|_| NotText)?;
                let texts =
                    values.into_iter().map(|value| Field { name: Cow::Borrowed(""), value: Written::Raw(value.get()) }.text());
                Ok(Cow::Owned(texts.collect::<Result<Vec<_>, _>>()?.join(",")))
            }
            Some(_) => Ok(Cow::Borrowed(raw)),
        }
    }
}

/// A text with escapes. Read as bytes, since serde_json knows no other way that takes half a
/// surrogate pair without giving up the whole element.
fn decoded(raw: &str) -> Result<String, NotText> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
    }
    let bytes = serde_json::Deserializer::from_str(raw).deserialize_bytes(Bytes).map_err(|_| NotText)?;
    String::from_utf8(bytes).map_err(|_| NotText)
}

/// An object, whose values are all plain texts if it says so; any other is an error then.
struct Object<'a, const IS_PLAIN: bool>(Vec<Field<'a>>);

/// A plain text.
struct Plain<'a>(&'a str);

impl<'de> Deserialize<'de> for Plain<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PlainVisitor;
        impl<'de> Visitor<'de> for PlainVisitor {
            type Value = Plain<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text without escapes")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Plain<'de>, E> {
                Ok(Plain(text))
            }
        }
        deserializer.deserialize_str(PlainVisitor)
    }
}

impl<'de, const IS_PLAIN: bool> Deserialize<'de> for Object<'de, IS_PLAIN> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name<'a>(Cow<'a, str>);
        impl<'de> Deserialize<'de> for Name<'de> {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct NameVisitor;
                impl<'de> Visitor<'de> for NameVisitor {
                    type Value = Name<'de>;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a name")
                    }

                    fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Name<'de>, E> {
                        Ok(Name(Cow::Borrowed(name)))
                    }

                    fn visit_str<E>(self, name: &str) -> Result<Name<'de>, E> {
                        Ok(Name(Cow::Owned(name.to_owned())))
                    }
                }
                deserializer.deserialize_str(NameVisitor)
            }
        }
        struct ObjectVisitor<const IS_PLAIN: bool>;
        impl<'de, const IS_PLAIN: bool> Visitor<'de> for ObjectVisitor<IS_PLAIN> {
            type Value = Object<'de, IS_PLAIN>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de, IS_PLAIN>, A::Error> {
                let mut fields = Vec::with_capacity(8);
                while let Some(Name(name)) = map.next_key()? {
                    let value = if IS_PLAIN {
                        Written::Plain(map.next_value::<Plain<'de>>()?.0)
                    } else {
                        Written::Raw(map.next_value::<&'de RawValue>()?.get())
                    };
                    fields.push(Field { name, value });
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(ObjectVisitor::<IS_PLAIN>)
    }
}

/// Cuts the elements out of the lists in a file of documents, in bounded memory. What stands around
/// the lists is passed over.
#[derive(Debug, Default)]
pub(super) struct Documents {
    /// The lists and objects that are open here and looked through, the innermost last.
    open: Vec<Container>,
    expected: Expected,
    /// The name of the field that comes next is one of [`LISTS`].
    is_list_next: bool,
    value: Value,
    /// The elements that were handed over.
    elements: u64,
    lists: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    List,
    Object,
}

/// What may come next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expected {
    /// A value; at the top also the end of the file.
    #[default]
    Value,
    /// A first element, or the end of the list.
    FirstElement,
    /// A first name, or the end of the object.
    FirstName,
    Name,
    Colon,
    /// A comma, or the end of what is open.
    CommaOrEnd,
    /// The rest of a value that is cut out or passed over.
    Rest,
}

/// A value that has begun.
#[derive(Debug, Default)]
struct Value {
    bytes: Vec<u8>,
    role: Role,
    is_too_long: bool,
    /// Brackets that are open.
    depth: usize,
    is_in_text: bool,
    is_after_backslash: bool,
    /// A number, true, false or null: it ends before what comes after it.
    is_bare: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Passed,
    Name,
    Element,
}

impl Value {
    fn begin(&mut self, role: Role) {
        self.bytes.clear();
        (self.role, self.is_too_long, self.depth) = (role, false, 0);
        (self.is_in_text, self.is_after_backslash, self.is_bare) = (false, false, false);
    }

    /// Takes the part of `chunk` that belongs to the value; says how much that is, and whether the
    /// value ends there.
    fn take(&mut self, chunk: &[u8]) -> (usize, bool) {
        for (place, byte) in chunk.iter().enumerate() {
            if self.is_in_text {
                if self.is_after_backslash {
                    self.is_after_backslash = false;
                } else if *byte == b'\\' {
                    self.is_after_backslash = true;
                } else if *byte == b'"' {
                    self.is_in_text = false;
                    if self.depth == 0 {
                        return (place + 1, true);
                    }
                }
                continue;
            }
            match byte {
                b'"' if !self.is_bare => self.is_in_text = true,
                b'{' | b'[' if !self.is_bare => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (place + 1, true);
                    }
                }
                b',' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => return (place, true),
                _ if self.depth == 0 => self.is_bare = true,
                _ => {}
            }
        }
        (chunk.len(), false)
    }

    fn keep(&mut self, part: &[u8]) {
        if self.role == Role::Passed || self.is_too_long {
            return;
        }
        if self.bytes.len() + part.len() > RECORD_BYTES_MAX {
            self.is_too_long = true;
            self.bytes.clear();
        } else {
            self.bytes.extend_from_slice(part);
        }
    }
}

impl Documents {
    /// Reads on, and hands over each element that ends here: its number, counted from 1, and its
    /// text, or none when it is longer than [`RECORD_BYTES_MAX`].
    ///
    /// # Errors
    /// What `take` answers, or that the file is no JSON.
    pub(super) fn push<E: From<Refused>>(
        &mut self,
        mut chunk: &[u8],
        mut take: impl FnMut(u64, Option<&[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(first) = chunk.first() {
            if self.expected == Expected::Rest {
                let (count, is_end) = self.value.take(chunk);
                self.value.keep(&chunk[..count]);
                chunk = &chunk[count..];
                if is_end {
                    self.end_value(&mut take)?;
                }
                continue;
            }
            if first.is_ascii_whitespace() {
                chunk = &chunk[1..];
                continue;
            }
            if self.step(*first)? {
                chunk = &chunk[1..];
            }
        }
        Ok(())
    }

    /// Says whether the file ended where it may.
    ///
    /// # Errors
    /// When it breaks off, or has no list in it.
    pub(super) fn finish(&self) -> Result<(), Refused> {
        if !self.open.is_empty() || self.expected != Expected::Value {
            return Err(Refused::Json("it breaks off before its end"));
        }
        if self.lists == 0 { Err(Refused::NoList) } else { Ok(()) }
    }

    /// Takes one byte that is no space, and says whether it is done with; if not, a value begins
    /// with it.
    fn step(&mut self, byte: u8) -> Result<bool, Refused> {
        let container = self.open.last().copied();
        match (self.expected, byte) {
            (Expected::FirstElement, b']') | (Expected::FirstName, b'}') => self.close(),
            (Expected::CommaOrEnd, b']') if container == Some(Container::List) => self.close(),
            (Expected::CommaOrEnd, b'}') if container == Some(Container::Object) => self.close(),
            (Expected::CommaOrEnd, b',') if container == Some(Container::List) => self.expected = Expected::Value,
            (Expected::CommaOrEnd, b',') => self.expected = Expected::Name,
            (Expected::Colon, b':') => self.expected = Expected::Value,
            (Expected::FirstName | Expected::Name, b'"') => return Ok(self.begin(Role::Name)),
            (Expected::Value | Expected::FirstElement, b']' | b'}' | b',' | b':') => {
                return Err(Refused::Json("a value is missing"));
            }
            (Expected::Value | Expected::FirstElement, _) if container == Some(Container::List) => {
                return Ok(self.begin(Role::Element));
            }
            (Expected::Value, b'[' | b'{') if container.is_none() || self.is_list_next => {
                if self.open.len() == DEPTH_MAX {
                    return Err(Refused::Json("its list is too deep inside"));
                }
                let is_list = byte == b'[';
                self.lists += u64::from(is_list);
                self.open.push(if is_list { Container::List } else { Container::Object });
                self.expected = if is_list { Expected::FirstElement } else { Expected::FirstName };
                self.is_list_next = false;
            }
            (Expected::Value, _) if container.is_some() => return Ok(self.begin(Role::Passed)),
            (Expected::Value, _) => return Err(Refused::Json("text stands outside of its lists and objects")),
            _ => return Err(Refused::Json("a comma, a colon or a name is missing")),
        }
        Ok(true)
    }

    fn begin(&mut self, role: Role) -> bool {
        self.value.begin(role);
        self.expected = Expected::Rest;
        false
    }

    fn close(&mut self) {
        self.open.pop();
        self.expected = if self.open.is_empty() { Expected::Value } else { Expected::CommaOrEnd };
    }

    fn end_value<E: From<Refused>>(&mut self, take: &mut impl FnMut(u64, Option<&[u8]>) -> Result<(), E>) -> Result<(), E> {
        self.expected = Expected::CommaOrEnd;
        match self.value.role {
            Role::Passed => {}
            Role::Name => {
                let name = decoded(str::from_utf8(&self.value.bytes).unwrap_or_default()).unwrap_or_default();
                self.is_list_next = LISTS.contains(&name.as_str());
                self.expected = Expected::Colon;
            }
            Role::Element => {
                self.elements += 1;
                let bytes = (!self.value.is_too_long).then_some(self.value.bytes.as_slice());
                take(self.elements, bytes)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(text: &str, size: usize) -> Result<Vec<String>, Refused> {
        let (mut documents, mut seen) = (Documents::default(), Vec::new());
        for chunk in text.as_bytes().chunks(size) {
            documents.push(chunk, |number, element| {
                assert_eq!(number, seen.len() as u64 + 1);
                seen.push(element.map_or("too long".to_owned(), |element| String::from_utf8_lossy(element).into_owned()));
                Ok::<_, Refused>(())
            })?;
        }
        documents.finish()?;
        Ok(seen)
    }

    #[test]
    fn elements_are_cut_out_in_any_pieces() {
        let long = format!("[\"{}\",2]", "x".repeat(RECORD_BYTES_MAX));
        for (text, expected) in [
            ("[]", &[][..]),
            ("[1, \"a]\\\"\" ,{\"x\":[{}]},[2]\n,null]", &["1", "\"a]\\\"\"", "{\"x\":[{}]}", "[2]", "null"]),
            ("{\"a\":[1],\"items\":[2,3],\"b\":{\"items\":[4]},\"c\":1.5,\"d\":\"x\"}", &["2", "3"]),
            ("{\"data\":{\"x\":0,\"entries\":[{}]}} {\"items\":[1]}", &["{}", "1"]),
            ("{\"\\u0069tems\":[1]}", &["1"]),
            (&long, &["too long", "2"]),
        ] {
            for size in [1, 2, 3, 7, 1 << 20] {
                assert_eq!(
                    elements(text, size).as_deref().ok(),
                    Some(expected.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>().as_slice()),
                    "{text:.80} {size}"
                );
            }
        }
    }

    #[test]
    fn what_is_no_document_with_a_list_is_refused() {
        for text in [
            "{}",
            "{\"a\":1}",
            "[1,]",
            "[1",
            "[1]]",
            "{\"items\":[1]",
            "{\"items\" [1]}",
            "{items:[1]}",
            "[1 2]",
            "x",
            "[1]x",
            "{\"a\":1,}",
            "{\"a\"}",
            "[1}",
            "{\"items\":1}",
        ] {
            for size in [1, 100] {
                assert!(elements(text, size).is_err(), "{text}");
            }
        }
        assert!(elements(&"{\"data\":".repeat(10_000), 100).is_err());
    }

    #[test]
    fn a_value_is_a_cell_and_a_bad_one_fails_where_it_is_used() {
        let text =
            r#"{"a":"x\ny","b":["p",1,null],"c":{"code":"hardBounce","x":{}},"d":null,"e":1e999,"f":"\ud800","g":true,"h":"ü"}"#;
        let Ok(Element::Object(fields)) = element(text.as_bytes()) else { panic!("an object") };
        let texts: Vec<_> = fields.iter().map(|field| (&*field.name, field.text())).collect();
        let expected = [
            ("a", Ok("x\ny")),
            ("b", Ok("p,1,")),
            ("c", Ok("")),
            ("d", Ok("")),
            ("e", Ok("1e999")),
            ("f", Err(NotText)),
            ("g", Ok("true")),
            ("h", Ok("ü")),
            ("c.code", Ok("hardBounce")),
            ("c.x", Ok("")),
        ];
        assert_eq!(texts, expected.map(|(name, text)| (name, text.map(Cow::Borrowed))));
        for bad in ["{", "{\"a\":}", "{\"a\":1} x", "\"a", "[1", "nonsense", "", "{\"a\":\"\u{1}\"}"] {
            assert!(element(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(matches!(element(b"[1]"), Ok(Element::Other)));
    }

    #[test]
    fn one_value_that_is_no_plain_text_changes_no_other() {
        let texts = |text: &str| {
            let Ok(Element::Object(fields)) = element(text.as_bytes()) else { panic!("an object") };
            fields.iter().map(|field| (field.name.to_string(), field.text().map(Cow::into_owned))).collect::<Vec<_>>()
        };
        let plain = texts(r#"{"email":"a@b.de","n\u0061me":"ü","x":""}"#);
        for other in ["null", "1e999", "\"\\ud800\"", "[1]", "\"a\\nb\"", "{}"] {
            let mixed = texts(&format!(r#"{{"email":"a@b.de","n\u0061me":"ü","x":"","y":{other}}}"#));
            assert_eq!(mixed[..3], plain[..], "{other}");
        }
    }

    #[test]
    fn the_shape_is_told_by_the_first_line() {
        for (head, is_all, expected) in [
            ("", false, Look::More),
            ("", true, Look::Other),
            ("a@b.de\n", false, Look::Other),
            ("[", false, Look::Json(Shape::Document)),
            ("{\"email\":\"a\"}", false, Look::More),
            ("{\"email\":\"a\"}\n", false, Look::Json(Shape::Lines)),
            ("{\"email\":\"a\",\"data\":[]}\n", false, Look::Json(Shape::Lines)),
            ("{\"items\":[1]}\n", false, Look::Json(Shape::Document)),
            ("{\n", false, Look::Json(Shape::Document)),
            ("{\"x\":1}\n", false, Look::More),
            ("{\"x\":1}\n\n", true, Look::Json(Shape::Document)),
            ("{\"x\":1}", true, Look::Json(Shape::Document)),
            ("{\"x\":1}\n{", false, Look::Json(Shape::Lines)),
            ("{\"Mail\":1}\n", false, Look::Json(Shape::Lines)),
            ("{x}\n", true, Look::Json(Shape::Lines)),
        ] {
            assert_eq!(look(head.as_bytes(), is_all, Some("Mail")), expected, "{head:?}");
        }
    }
}
