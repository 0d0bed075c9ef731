//! The tokenizer in other libraries' formats.

use std::collections::HashSet;
use std::fmt::Write;

use crate::{invalid, Result, Tokenizer};

impl Tokenizer {
    /// tiktoken's text: a line per ordinary token, its bytes in base64 and its id.
    pub fn to_tiktoken(&self) -> String {
        let mut text = String::new();
        for id in 0..self.tokens.len() {
            base64(self.tokens.key(id), &mut text);
            let _ = writeln!(text, " {id}"); // writing to a String cannot fail
        }
        text
    }

    /// The tokenizer.json of the library tokenizers: byte-level BPE that splits by our pattern.
    pub fn to_huggingface(&self) -> Result<String> {
        let alphabet = byte_alphabet();
        let spell = |id: u32| -> String {
            self.tokens.key(id as usize).iter().map(|&byte| alphabet[byte as usize]).collect()
        };
        let vocabulary: Vec<String> = (0..self.tokens.len() as u32).map(spell).collect();
        let taken: HashSet<&str> = vocabulary.iter().map(String::as_str).collect();
        if let Some(name) = self.specials.iter().find(|name| taken.contains(name.as_str())) {
            return invalid(format!(
                "a special token in tokenizer.json must be no ordinary one, {name:?} is both"
            ));
        }
        let entries = vocabulary.iter().enumerate().map(|(id, token)| format!("{}:{id}", json(token)));
        let spelled = |id: u32| json(&vocabulary[id as usize]);
        let merges =
            self.merges.iter().map(|&(left, right)| format!("[{},{}]", spelled(left), spelled(right)));
        let added = self.specials.iter().zip(self.tokens.len()..).map(|(name, id)| {
            format!(
                "{{\"id\":{id},\"content\":{},\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\
                 \"normalized\":false,\"special\":true}}",
                json(name)
            )
        });
        let byte_level =
            "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}";
        Ok(format!(
            "{{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[{}],\"normalizer\":null,\
             \"pre_tokenizer\":{{\"type\":\"Sequence\",\"pretokenizers\":[{{\"type\":\"Split\",\
             \"pattern\":{{\"Regex\":{}}},\"behavior\":\"Isolated\",\"invert\":false}},{byte_level}]}},\
             \"post_processor\":null,\"decoder\":{byte_level},\"model\":{{\"type\":\"BPE\",\"dropout\":null,\
             \"unk_token\":null,\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,\
             \"byte_fallback\":false,\"ignore_merges\":true,\"vocab\":{{{}}},\"merges\":[{}]}}}}\n",
            join(added),
            json(self.pattern.as_str()),
            join(entries),
            join(merges),
        ))
    }
}

fn join(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(",")
}

/// GPT-2's printable character for every byte: itself where Latin-1 prints it, else one from U+0100 on.
fn byte_alphabet() -> [char; 256] {
    let mut alphabet = ['\0'; 256];
    let mut spare = (0x100..).filter_map(char::from_u32);
    for byte in 0..=255u8 {
        let prints = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        alphabet[byte as usize] = if prints { byte.into() } else { spare.next().unwrap_or_default() };
    }
    alphabet
}

fn json(text: &str) -> String {
    let mut out = String::from("\"");
    for char in text.chars() {
        match char {
            '"' | '\\' => out.extend(['\\', char]),
            '\0'..='\x1F' => drop(write!(out, "\\u{:04x}", char as u32)),
            _ => out.push(char),
        }
    }
    out + "\""
}

fn base64(bytes: &[u8], out: &mut String) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for three in bytes.chunks(3) {
        let group = (0..3).fold(0u32, |sum, index| sum << 8 | u32::from(*three.get(index).unwrap_or(&0)));
        for place in 0..4 {
            let digit = DIGITS[(group >> (18 - 6 * place)) as usize & 63];
            out.push(if place <= three.len() { digit.into() } else { '=' });
        }
    }
}
