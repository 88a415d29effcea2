//! Tests of the decision between hand-off, first token from the prefill engine, and a decode engine alone.

use super::*;

fn decide(kind: GenerationKind, body: &str, flow: DecodeFlow) -> ServingMode {
    serving_mode(kind, &Document::parse(body.as_bytes()).expect("an object"), flow)
}

#[test]
fn requests_without_an_exact_handoff_are_decode_only() {
    let handoff = [
        r#"{"prompt":"x"}"#,
        r#"{"prompt":[1, 2]}"#,
        r#"{"prompt":"x","n":1,"echo":false,"prompt_logprobs":null,"max_tokens":1}"#,
        r#"{"prompt":"x","logprobs":3,"stop":["a"],"min_tokens":2,"seed":1}"#,
    ];
    for body in handoff {
        assert_eq!(
            decide(GenerationKind::Completions, body, DecodeFlow::Original),
            ServingMode::Handoff,
            "{body}"
        );
    }
    let bypass = [
        (r#"{"prompt":"x","n":2}"#, "n"),
        (r#"{"prompt":"x","n":"2"}"#, "n"),
        (r#"{"prompt":"x","n":1,"n":3}"#, "n"),
        (r#"{"prompt":"x","use_beam_search":true}"#, "use_beam_search"),
        (r#"{"prompt":"x","echo":true}"#, "echo"),
        (r#"{"prompt":"x","echo":true,"logprobs":1}"#, "echo"),
        (r#"{"prompt":"x","prompt_logprobs":0}"#, "prompt_logprobs"),
        (r#"{"prompt":["x"]}"#, "prompt"),
        (r#"{"prompt":[[1],[2]]}"#, "prompt"),
        (r#"{"prompt":[]}"#, "prompt"),
        (r#"{"prompt":"x","max_tokens":0}"#, "max_tokens"),
        (r#"{"prompt":"x","max_tokens":"7"}"#, "max_tokens"),
        (r#"{"model":"m"}"#, "prompt"),
    ];
    for (body, reason) in bypass {
        for flow in [DecodeFlow::Original, DecodeFlow::TokenSplice] {
            assert_eq!(
                decide(GenerationKind::Completions, body, flow),
                ServingMode::DecodeOnly(reason),
                "{body}"
            );
        }
    }
    let chat = r#"{"messages":[{"role":"user","content":"x"}],"tools":[{}],"max_completion_tokens":5}"#;
    assert_eq!(
        decide(GenerationKind::Chat, chat, DecodeFlow::Original),
        ServingMode::Handoff
    );
    assert_eq!(
        decide(GenerationKind::Chat, r#"{"messages":"x"}"#, DecodeFlow::Original),
        ServingMode::DecodeOnly("messages")
    );
}

#[test]
fn only_exact_requests_get_their_first_token_from_prefill() {
    let request = |limit, stream, include_usage| {
        ServingMode::FirstToken(FirstTokenRequest {
            limit,
            stream,
            include_usage,
        })
    };
    let served = [
        (
            GenerationKind::Completions,
            r#"{"prompt":"x"}"#,
            request(Some(16), false, false),
        ),
        (
            GenerationKind::Completions,
            r#"{"prompt":"x","max_tokens":null}"#,
            request(Some(16), false, false),
        ),
        // The request of `vllm bench serve`.
        (
            GenerationKind::Completions,
            r#"{"model":"m","prompt":"x","temperature":0.0,"repetition_penalty":1.0,"max_tokens":200,"logprobs":null,
                "stream":true,"stream_options":{"include_usage":true},"ignore_eos":true}"#,
            request(Some(200), true, true),
        ),
        (
            GenerationKind::Chat,
            r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":9,"max_completion_tokens":5,"tools":null}"#,
            request(Some(5), false, false),
        ),
        (
            GenerationKind::Chat,
            r#"{"messages":[{"role":"user","content":"x"}]}"#,
            request(None, false, false),
        ),
    ];
    for (kind, body, expected) in served {
        assert_eq!(decide(kind, body, DecodeFlow::TokenSplice), expected, "{body}");
    }
    for extra in [
        r#""logprobs":1"#,
        r#""stop":"a""#,
        r#""stop_token_ids":[1]"#,
        r#""seed":1"#,
        r#""min_tokens":2"#,
        r#""presence_penalty":0.5"#,
        r#""response_format":{"type":"json_object"}"#,
        r#""tools":[]"#,
        r#""logit_bias":{"1":1}"#,
        r#""return_token_ids":true"#,
        r#""suffix":"b""#,
        r#""some_new_field":false"#,
        r#""add_special_tokens":false"#,
        r#""stream":"true""#,
        r#""stream":true,"stream_options":{"continuous_usage_stats":true}"#,
        r#""stream_options":{"include_usage":true}"#,
    ] {
        let body = format!(r#"{{"prompt":"x",{extra}}}"#);
        let decided = decide(GenerationKind::Completions, &body, DecodeFlow::TokenSplice);
        assert!(matches!(decided, ServingMode::DecodeOnly(_)), "{body}");
    }
    for messages in [
        r#"[{"role":"user","content":[{"type":"image_url"}]}]"#,
        r#"[{"role":"assistant","content":"x","tool_calls":[]}]"#,
    ] {
        let body = format!(r#"{{"messages":{messages}}}"#);
        let decided = decide(GenerationKind::Chat, &body, DecodeFlow::TokenSplice);
        assert_eq!(decided, ServingMode::DecodeOnly("messages"), "{body}");
    }
}
