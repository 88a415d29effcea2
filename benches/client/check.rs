//! The bench in a tiny form, as `cargo test` runs it: that the server paces, that what it notes is what the client is told,
//! and that the row is there. It asserts no times but the order of what must come after what.

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
    // The request takes its way and so does the answer, so a client can only tell more than the truth.
    assert!(compared.told_ttft.mean >= compared.true_ttft.mean, "{compared:?}");
    assert!(
        compared.told_itl.mean > 0.0 && compared.true_itl.mean > 0.0,
        "{compared:?}"
    );
    println!("the bench works");
}
