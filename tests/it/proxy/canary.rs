//! The canary: what passes it, and which errors it detects.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use xpyd::connector::TransferUnit;
use xpyd::fleet::{EngineId, EngineState, FleetStage, Role};
use xpyd::proxy::{CanaryError, CanaryPrompts, CanaryReport};

use super::harness::{ProxyHarness, ScriptedEngine, json_response, nixl_prefill_response};

/// Runs a canary over a pair. The decode engine reports `moved` bytes per hand-off and answers with these texts.
async fn run_canary(moved: usize, handed: &'static str, alone: &'static str) -> Result<CanaryReport, CanaryError> {
    let bytes = Arc::new(AtomicUsize::new(7));
    let prefill = ScriptedEngine::start(|_| async { nixl_prefill_response() }).await;
    let decode = ScriptedEngine::start(move |seen| {
        let bytes = Arc::clone(&bytes);
        async move {
            if seen.path == "/metrics" {
                let bytes = bytes.load(Ordering::Relaxed);
                return json_response(
                    200,
                    format!("vllm:nixl_bytes_transferred_sum{{engine=\"0\"}} {bytes}.0\n"),
                );
            }
            let through = seen.json().get("kv_transfer_params").is_some();
            if through {
                bytes.fetch_add(moved, Ordering::Relaxed);
            }
            let text = if through { handed } else { alone };
            json_response(
                200,
                format!(r#"{{"choices":[{{"text":"{text}","finish_reason":"length"}}]}}"#),
            )
        }
    })
    .await;
    let harness = ProxyHarness::nixl(&[prefill.port], &[decode.port]).await;
    harness.change(|view| {
        view.stage = FleetStage::Verifying;
        for engine in &mut view.engines {
            Arc::make_mut(engine).state = EngineState::Healthy;
        }
    });
    let waits_in_vain = moved == 0;
    if waits_in_vain {
        tokio::time::pause();
    }
    let report = harness
        .proxy
        .canary(
            &EngineId::new(Role::Prefill, 0),
            &EngineId::new(Role::Decode, 0),
            CanaryPrompts::ShortAndLong,
        )
        .await;
    if waits_in_vain {
        // The proxy's threads run in real time.
        tokio::time::resume();
    }
    let clients = [
        "xpyd_handoff_total",
        "xpyd_stage_seconds_count",
        "xpyd_request_seconds_count",
    ];
    for name in clients {
        assert_eq!(
            harness.metric(&format!("{name}{{")),
            "",
            "{name}: canaries do not count as clients"
        );
    }
    assert_eq!(harness.metric("xpyd_time_to_first_token_seconds_count"), "0");
    if let Ok(report) = &report {
        let flown = report.total.as_nanos() > 0;
        let counted = harness.metric(r#"xpyd_canary_request_seconds_count{outcome="answered"}"#);
        assert_eq!((flown, counted.as_str()), (true, "1"));
        assert_eq!(harness.metric(r#"xpyd_canary_handoff_total{outcome="sent"}"#), "1");
    }
    harness.finish().await;
    report
}

#[tokio::test]
async fn a_working_pair_passes_the_canary() {
    let report = run_canary(4096, "same", "same").await.expect("a good pair");
    assert_eq!(
        report.pair,
        (EngineId::new(Role::Prefill, 0), EngineId::new(Role::Decode, 0))
    );
    assert_eq!(
        (report.transferred.amount.to_string(), report.transferred.unit),
        ("4096".into(), TransferUnit::Bytes)
    );
}

#[tokio::test]
async fn wrong_kv_is_detected_by_the_output() {
    let error = run_canary(4096, "one", "two").await.expect_err("a bad pair");
    assert!(
        matches!(&error, CanaryError::Differs { through, alone, .. } if through == "one" && alone == "two"),
        "{error}"
    );
}

#[tokio::test]
async fn a_right_answer_without_a_transfer_fails() {
    let error = run_canary(0, "same", "same").await.expect_err("no transfer");
    assert!(matches!(error, CanaryError::NothingMoved { .. }), "{error}");
}

#[tokio::test]
async fn a_pair_that_is_down_is_named() {
    let harness = ProxyHarness::nixl(&[1], &[1]).await;
    harness.lose(Role::Decode, 0);
    let error = harness
        .proxy
        .canary(
            &EngineId::new(Role::Prefill, 0),
            &EngineId::new(Role::Decode, 0),
            CanaryPrompts::ShortAndLong,
        )
        .await;
    assert!(error.expect_err("no engine").to_string().contains("decoder1"));
    harness.finish().await;
}
