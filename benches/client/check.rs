//! A small run of the bench, as a test: the server keeps its pace, its record matches the client's, and the row is
//! printed. It asserts the order of events, but no times.

use std::time::Duration;

use crate::server::Pace;
use crate::{Options, measure_all};

pub(crate) async fn all() {
    let options = Options {
        only: vec!["xpyd".to_owned()],
        rates: vec![20.0],
        seconds: 0.5,
        tokens: 8,
        pace: Pace {
            first: Duration::from_millis(20),
            next: Duration::from_millis(5),
        },
    };
    let table = measure_all(&options).await;
    table.print_goals();
    assert!(table.is_valid(), "no row");
    let compared = table.rows[0].compared;
    assert!(compared.true_ttft.mean >= 20.0, "the server was early: {compared:?}");
    // Request and answer need time to travel, so a client can only measure more than the server.
    assert!(compared.client_ttft.mean >= compared.true_ttft.mean, "{compared:?}");
    assert!(
        compared.client_itl.mean > 0.0 && compared.true_itl.mean > 0.0,
        "{compared:?}"
    );
    println!("the bench works");
}
