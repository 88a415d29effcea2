//! Generates docs/matrix.md from the route table and the field table.

use std::fmt::Write as _;
use std::path::Path;

use crate::body::field_table::{FIELDS, Field, When};
use crate::body::serving_mode::GenerationKind;
use crate::server::route_table::{ROUTES, RouteAction, RouteMethods};

const CANNOT_TELL: &str = "
## What \"cannot tell\" means

- Everything but the generated text is one engine's, byte for byte: statuses, fields, usage, events and their order. Ids and times are
  always new.
- Generated text is one engine's wherever that engine repeats itself. It does not where two tokens are almost equally likely: vLLM adds
  in another order when another number of requests shares a step, or the prompt is computed in other pieces, and a bf16 logit of 16
  to 32 has steps of 0.125. At such a place greedy decoding can pick either token. With
  SmolLM2-135M about one answer of ten came to such a place, the log-probabilities of the two 0 to 0.125 apart.
- So `tests/real` compares token by token: where two texts differ, each side must find the other's token as likely as its own, to 0.5.
  The canary judges in the same way before a fleet is ready. KV that is wrong, lost or another prompt's changes which tokens are
  likely at all, and fails both.
- Engines of a fleet with different `tensor_parallel` add in different orders, so their texts differ more often.
";

const HEAD: &str = "\
# How requests are served

A client cannot tell a fleet from one big vLLM, except by its speed ([how exact that is](#what-cannot-tell-means)). So every
route of the servers of vLLM 0.32 and
0.33 and every field of their generations has a rule. If two engines cannot serve a request exactly, one engine serves it.
This page is generated from the rules in `crates/proxy/src/server/route_table.rs` and `crates/proxy/src/body/field_table.rs`; a test compares them, and
`XPYD_UPDATE_DOCS=1 cargo test -p xpyd-proxy matrix` writes it again. `tests/it/proxy/exact` compares the fleet's bytes with one
simulated engine's for each cell, `tests/real/run.sh FOLDER matrix` with real vLLM's.

- **handed over**: prefill on one engine, decode on another, from the client's own bytes.
- **first token**: the prefill engine also makes the first token (`first_token = \"prefiller\"` with LMCache only). Other requests
  go to a decode engine alone.
- **alone**: one decode engine answers, from the client's own bytes. xpyd does not split several choices or
  prompts over engines: that would cost more than it saves.
- **refused**: no engine sees it; the answer is an error in OpenAI's shape.

A body is JSON (`Content-Type: application/json`) in UTF-8 or UTF-16, without `Content-Encoding`. It is at most `proxy.max_body`
long, has at most 1,024 members and 1,000 levels of nesting; xpyd refuses more. Of members with the same key only the last one reaches
the engine.

In each case xpyd removes `kv_transfer_params` and `ec_transfer_params`, also from `vllm_xargs`. Other fields reach the engine
as the client wrote them. The proxy sets the id of each answer. `usage` is that of one engine
started with `--enable-prompt-tokens-details`, as xpyd starts its own: after a hand-off, `cached_tokens` counts what the prefill engine had cached, not the KV that came from it. If the prefill engine refuses a request, the
client gets the decode engine's answer to it. A generation that ends with `abort` or `error` is an error, also
after the first event.

";

fn methods(methods: RouteMethods) -> &'static str {
    match methods {
        RouteMethods::Get => "GET",
        RouteMethods::Post => "POST",
        RouteMethods::Both => "GET, POST",
    }
}

fn fate(action: RouteAction) -> (&'static str, &'static str) {
    match action {
        RouteAction::Generate(_) => ("handed over", "by its fields, below"),
        RouteAction::Live => ("the proxy's", "200 while the proxy works, whatever its engines do"),
        RouteAction::Health => ("the proxy's", "200 while there is a ready engine of each role"),
        RouteAction::Metrics => ("the proxy's", "its own metrics"),
        RouteAction::Version => ("alone", "at most five times a second, shared by all clients that ask"),
        RouteAction::Pass => ("alone", ""),
        RouteAction::Refuse(why) => ("refused", why),
    }
}

fn cell(served: &str, when: When) -> String {
    match when {
        When::Always => served.to_owned(),
        When::Never => "alone".to_owned(),
        When::Only(values) => {
            let values: Vec<String> = values.iter().map(|value| format!("`{value}`")).collect();
            format!("{served} with {}, else alone", values.join(" or "))
        }
        When::Count => format!("{served} with a whole number from 1, else alone"),
        When::OnePrompt => format!("{served} with one text or one list of token ids, else alone"),
        When::List => format!("{served} with a list, else alone"),
        When::PlainChat => format!("{served} with messages of a role and a text, else alone"),
        When::IncludeUsage => format!("{served} with `include_usage` only, else alone"),
    }
}

fn kinds(field: &Field) -> &'static str {
    match field.kinds {
        [GenerationKind::Completions] => "completions",
        [GenerationKind::Chat] => "chat",
        _ => "both",
    }
}

fn render() -> String {
    let mut text = HEAD.to_owned();
    text += "## Routes\n\nAny other path is answered 404, and a path with an extra trailing slash 307.\n\n| Route | Methods | Served | |\n|---|---|---|---|\n";
    for route in ROUTES {
        let (what, why) = fate(route.action);
        writeln!(
            text,
            "| `{}` | {} | {what} | {why} |",
            route.path,
            methods(route.methods)
        )
        .expect("a string takes all");
    }
    text += "\nResponses that vLLM stores (`VLLM_ENABLE_RESPONSES_API_STORE=1`) are known to the engine that made them: with several \
             decode\nengines, bind sessions (`proxy.bind_sessions`).\n\n";
    text += "## Fields of `/v1/completions` and `/v1/chat/completions`\n\nAbsent fields and `null` change nothing. A field that is not \
             here is handed over, but the decode engine makes its first token.\n\n| Field | Of | Hand-off | First token | |\n|---|---|---|---|---|\n";
    for field in FIELDS {
        let (handoff, first_token) = (
            cell("handed over", field.handoff),
            cell("first token", field.first_token),
        );
        writeln!(
            text,
            "| `{}` | {} | {handoff} | {first_token} | {} |",
            field.name,
            kinds(field),
            field.why
        )
        .expect("a string takes all");
    }
    text + CANNOT_TELL
}

#[test]
fn the_document_matches_the_rules() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/matrix.md");
    if std::env::var_os("XPYD_UPDATE_DOCS").is_some() {
        fs_err::write(&path, render()).expect("the document can be written");
    }
    let written = fs_err::read_to_string(&path).expect("the document is there");
    assert!(
        written == render(),
        "docs/matrix.md is not what the rules say: run `XPYD_UPDATE_DOCS=1 cargo test -p xpyd-proxy matrix`"
    );
}

#[test]
fn every_field_is_listed_once_for_each_route() {
    for (place, field) in FIELDS.iter().enumerate() {
        let again = FIELDS[place + 1..]
            .iter()
            .any(|other| other.name == field.name && other.kinds.iter().any(|kind| field.kinds.contains(kind)));
        assert!(!again, "{}", field.name);
        // A hand-off serves everything that the first-token path serves.
        assert!(
            field.handoff != When::Never || field.first_token == When::Never,
            "{}",
            field.name
        );
    }
}
