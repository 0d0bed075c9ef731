//! How fast the core cuts and encodes on one thread, with nothing of Python around it:
//!
//!     cargo run --release --example rates -- tokenizer.bpe texts 5
//!
//! `texts` holds documents with a zero byte between them. Prints one line of JSON: the seconds of every round.

use std::hint::black_box;
use std::time::Instant;

use rustbpe_core::{Error, Pattern, Result, Tokenizer};

fn seconds(rounds: usize, work: &mut dyn FnMut() -> Result<usize>) -> Result<Vec<f64>> {
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            black_box(work()?);
            Ok(start.elapsed().as_secs_f64())
        })
        .collect()
}

fn split(texts: &[&str], pattern: &Pattern) -> Result<usize> {
    let (mut ends, mut count) = (Vec::new(), 0);
    for text in texts {
        let mut pieces = pattern.pieces(text)?;
        loop {
            pieces.next_block(&mut ends)?;
            if ends.is_empty() {
                break;
            }
            count += ends.len();
        }
    }
    Ok(count)
}

fn encode(texts: &[&str], tokenizer: &Tokenizer) -> Result<usize> {
    let (mut ids, mut count) = (Vec::new(), 0);
    for text in texts {
        ids.clear();
        tokenizer.encode(text, &mut ids)?;
        count += ids.len();
    }
    Ok(count)
}

fn measure(arguments: &[String]) -> Result<String> {
    let invalid = |sentence: String| Error::Invalid(sentence);
    let [file, texts, rounds] = arguments else {
        return Err(invalid("usage: rates TOKENIZER TEXTS ROUNDS".into()));
    };
    let rounds = rounds.parse().map_err(|_| invalid(format!("ROUNDS must be a number, got {rounds}")))?;
    let read = |path| std::fs::read(path).map_err(|error| Error::Io(format!("{path}: {error}")));
    let by_hand =
        |text: &str| Pattern::by_hand(text).ok_or_else(|| invalid(format!("not cut by hand: {text}")));
    let tokenizer = Tokenizer::from_bytes(&read(file)?, &by_hand)?;
    let text = String::from_utf8(read(texts)?).map_err(|error| invalid(format!("{texts}: {error}")))?;
    let texts: Vec<&str> = text.split('\0').collect();
    let cutting = seconds(rounds, &mut || split(&texts, tokenizer.pattern()))?;
    let encoding = seconds(rounds, &mut || encode(&texts, &tokenizer))?;
    Ok(format!("{{\"split\": {cutting:?}, \"encode\": {encoding:?}}}"))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match measure(&arguments) {
        Ok(line) => println!("{line}"),
        Err(Error::Invalid(sentence) | Error::Io(sentence)) => {
            eprintln!("error: {sentence}");
            std::process::exit(2);
        }
        Err(Error::Stopped) => unreachable!("nothing asks to stop"),
    }
}
