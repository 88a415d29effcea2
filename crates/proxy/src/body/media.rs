//! Finds the media in a prompt: images, audio, videos and files, which are long strings in JSON and few tokens in an
//! engine.
//!
//! Pure. The result is an estimate for scheduling; no answer depends on it. It knows the formats of `OpenAI`,
//! Anthropic and vLLM, and `data:` URLs anywhere.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::document::end_of_string;
use crate::hash::hash_of;

/// Estimated tokens of one image, audio clip, video or file. Models make about 250 to 2,000 tokens of an image.
pub(crate) const MEDIA_TOKENS: u64 = 1536;

/// Keys whose value is a medium.
const MEDIA_KEYS: [&str; 11] = [
    "image_url",
    "input_image",
    "image_pil",
    "image_embeds",
    "audio_url",
    "input_audio",
    "audio_embeds",
    "video_url",
    "input_video",
    "file",
    "source",
];

/// Keys whose value an engine always reads as text. A plain prompt has no key, hence the empty one.
const TEXT_KEYS: [&str; 9] = [
    "",
    "text",
    "content",
    "arguments",
    "output",
    "reasoning",
    "reasoning_content",
    "refusal",
    "thinking",
];

/// Shorter strings stay as they are, because they count little as text.
const LONG: usize = 256;

/// A prompt reduced to what determines its size.
#[derive(Debug)]
pub(crate) struct Condensed<'prompt> {
    /// The prompt's JSON text, with a hash in place of each medium.
    pub(crate) text: Cow<'prompt, str>,
    /// The number of images, audio clips, videos and files.
    pub(crate) media: u64,
}

/// Replaces the media of a prompt by hashes.
pub(crate) fn condensed(prompt: &str) -> Condensed<'_> {
    let bytes = prompt.as_bytes();
    let (mut text, mut copied) = (String::new(), 0);
    let (mut parts, mut blobs) = (0, 0);
    let (mut key, mut at) = ("", 0);
    while let Some(open) = memchr::memchr(b'"', &bytes[at..]) {
        let start = at + open + 1;
        let end = end_of_string(bytes, start);
        let string = &prompt[start..end];
        at = bytes.len().min(end + 1);
        if bytes[at..].trim_ascii_start().first() == Some(&b':') {
            key = string;
            parts += u64::from(MEDIA_KEYS.contains(&key));
            continue;
        }
        let is_text = TEXT_KEYS.contains(&key);
        let mut from = 0;
        while let Some((begin, length)) = blob(&string[from..], is_text) {
            let (begin, end) = (from + begin, from + begin + length);
            text.push_str(&prompt[copied..start + begin]);
            let hash = hash_of(&string[begin..end]);
            write!(text, "{hash:016x}").expect("writing to a string cannot fail");
            copied = start + end;
            blobs += 1;
            from = end;
        }
    }
    Condensed {
        text: if copied == 0 {
            Cow::Borrowed(prompt)
        } else {
            text.push_str(&prompt[copied..]);
            Cow::Owned(text)
        },
        media: parts.max(blobs),
    }
}

/// The start and length of the first medium in a string.
fn blob(string: &str, is_text: bool) -> Option<(usize, usize)> {
    if string.len() < LONG {
        return None;
    }
    let is_data = |at: &str| at.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"));
    // A URL, or base64 with or without line breaks: neither contains a space.
    if (!is_text || is_data(string)) && string.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Some((0, string.len()));
    }
    memchr::memmem::find_iter(string.as_bytes(), "data:").find_map(|begin| {
        let is_of_url = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=;:,._%-~!*'\\&?#@$".contains(&byte);
        let url = &string[begin..];
        let length = url.bytes().position(|byte| !is_of_url(byte)).unwrap_or(url.len());
        (length >= LONG && url[..length].contains(',')).then_some((begin, length))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Bytes of the remaining text, and the number of media.
    fn weighed(prompt: &Value) -> (usize, u64) {
        let prompt = prompt.to_string();
        let Condensed { text, media } = condensed(&prompt);
        (text.len(), media)
    }

    fn said(part: &Value) -> Value {
        json!([{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}])
    }

    #[test]
    fn every_spelling_of_a_medium_counts_as_one() {
        let payload = "QUJD/+==".repeat(100_000);
        let url = format!("data:image/png;base64,{payload}");
        let broken: String = payload.as_bytes().chunks(76).fold(String::new(), |text, line| {
            text + std::str::from_utf8(line).expect("ASCII") + "\r\n"
        });
        for part in [
            json!({"type": "image_url", "image_url": {"url": url, "detail": "low"}}),
            json!({"image_url": url}),
            json!({"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}),
            json!({"type": "image_url", "image_url": {"url": format!("https://example.com/{}", "x".repeat(2000))}}),
            json!({"type": "image_url", "image_url": {"url": url.replace("data:", "DATA:")}}),
            json!({"type": "input_image", "image_url": url}),
            json!({"type": "input_audio", "input_audio": {"data": payload, "format": "wav"}}),
            json!({"type": "audio_url", "audio_url": {"url": format!("data:audio/wav;base64,{payload}")}}),
            json!({"type": "video_url", "video_url": {"url": format!("data:video/mp4;base64,{payload}")}}),
            json!({"type": "file", "file": {"file_data": url, "filename": "a.pdf"}}),
            json!({"type": "file", "file": {"file_data": payload}}),
            json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": payload}}),
            json!({"type": "image", "source": {"type": "base64", "data": broken}}),
            json!({"type": "image_embeds", "image_embeds": payload}),
            json!({"type": "a kind of tomorrow", "anything": {"else": payload}}),
            json!({"type": "text", "text": url}),
            json!({"type": "text", "text": format!("look: ![a]({url}) there")}),
        ] {
            let (text, media) = weighed(&said(&part));
            let beginning: String = part.to_string().chars().take(100).collect();
            assert!(
                text < 300 && media == 1,
                "{text} bytes and {media} media of {beginning}"
            );
        }
        let two = json!([{"role": "user", "content": [{"image_url": url}, {"image_url": {"url": "https://a"}}]}]);
        assert_eq!(weighed(&two).1, 2);
        let escaped = format!(r#"[{{"content":[{{"image_url":"{}"}}]}}]"#, url.replace('/', "\\/"));
        assert!(condensed(&escaped).text.len() < 100);
    }

    #[test]
    fn text_is_weighed_as_text_and_not_copied() {
        for prompt in [
            json!("The metadata: a,b. Data:\n".repeat(1000)),
            json!(["QUJD".repeat(1000)]),
            json!([{"role": "user", "content": "QUJD".repeat(1000)}]),
            json!([{"role": "user", "content": [{"type": "text", "text": "QUJD".repeat(1000)}]}]),
            json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}".repeat(500)}}]}]),
            json!([1, 2, 3]),
        ] {
            let prompt = prompt.to_string();
            let Condensed { text, media } = condensed(&prompt);
            assert!(matches!(text, Cow::Borrowed(same) if same == prompt) && media == 0);
        }
    }

    #[test]
    fn other_media_have_other_hashes() {
        let of = |byte: &str| {
            condensed(&said(&json!({"image_url": byte.repeat(1000)})).to_string())
                .text
                .into_owned()
        };
        assert_eq!(of("a"), of("a"));
        assert_ne!(of("a"), of("b"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_growing(text in r#"([ -~]|data:|"|\\|é|[a-z]{300}){0,40}"#) {
            prop_assert!(condensed(&text).text.len() <= text.len());
        }
    }
}
