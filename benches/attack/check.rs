//! A small run of the tools, as a test. Only deadlines depend on the speed of the machine, and they are generous.

use std::time::Duration;

use tokio::time::Instant;

use crate::answers::ANSWERS;
use crate::fuzz;
use crate::growth;
use crate::load;
use crate::options::{Options, Tool};
use crate::shapes::SHAPES;
use crate::soak;
use crate::storm;

pub(crate) async fn all() {
    let begun = Instant::now();
    every_shape_of_a_request_is_answered().await;
    hostile_input_reaches_no_engine().await;
    a_hundred_streams_are_right().await;
    a_short_storm_finds_nothing().await;
    a_short_soak_leaves_nothing().await;
    println!("the attacks work; checked in {:?}", begun.elapsed());
}

async fn every_shape_of_a_request_is_answered() {
    let options = Options {
        max: 16 << 10,
        ..Options::of(Tool::Growth)
    };
    let all = growth::measure(&options).await;
    assert_eq!(all.len(), SHAPES.len() + ANSWERS.len());
    for growth in all {
        assert!(growth.rows.iter().all(|row| row.result.is_ok()), "{}", growth.name);
    }
}

async fn hostile_input_reaches_no_engine() {
    let options = Options {
        count: 440,
        ..Options::of(Tool::Fuzz)
    };
    let findings = fuzz::run(&options).await;
    assert!(findings.is_empty(), "{findings:#?}");
}

async fn a_hundred_streams_are_right() {
    let options = Options {
        clients: 100,
        events: 8,
        interval: Duration::from_millis(20),
        ..Options::of(Tool::Load)
    };
    let findings = load::run(&options).await;
    assert!(findings.is_empty(), "{findings:#?}");
}

async fn a_short_storm_finds_nothing() {
    let options = Options {
        most: 6,
        clients: 4,
        private: false,
        // Faults that start no engine, which is slow on a busy machine.
        only: ["40 half-open", "60 clients", "log files", "200 silent", "20 clients"]
            .map(str::to_owned)
            .to_vec(),
        ..Options::of(Tool::Storm)
    };
    let findings = storm::run(&options).await;
    assert!(findings.is_empty(), "{findings:#?}");
}

async fn a_short_soak_leaves_nothing() {
    let options = Options {
        duration: Duration::from_secs(2),
        clients: 4,
        connector: "lmcache".to_owned(),
        ..Options::of(Tool::Soak)
    };
    let mut findings = soak::run(&options).await;
    // New processes still grow.
    findings.retain(|finding| !finding.contains("grows"));
    assert!(findings.is_empty(), "{findings:#?}");
}
