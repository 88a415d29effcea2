//! Tests of the page: it is complete, safe, and limited in size.

use serde_json::{Value, json};

use super::of_file;
use super::run::Run;
use super::table::Values;
use super::timeline::Timeline;

const HOSTILE: &str = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u{2028}&amp;";

/// A result file with details: request `i` is sent after `i` tenths of a second and answered 300 ms later, with gaps
/// of 10 ms.
fn result(count: usize, gaps: usize, mut change: impl FnMut(usize, &mut Value)) -> Value {
    let mut each: Vec<Value> = Vec::new();
    for index in 0..count {
        let start = 5000.0 + index as f64 / 10.0;
        let latency = 0.3 + 0.01 * gaps as f64;
        let mut one = json!({"ttft": 0.3, "itl": vec![0.01; gaps], "latency": latency, "start": start, "error": ""});
        change(index, &mut one);
        each.push(one);
    }
    let list = |key: &str| each.iter().map(|one| one[key].clone()).collect::<Vec<_>>();
    let failed = each.iter().filter(|one| one["error"] != "").count();
    json!({
        "date": "20261122-205142", "backend": "openai", "model_id": "org/tiny", "num_prompts": count, "request_rate": 10.0,
        "burstiness": 1.0, "max_concurrency": null, "duration": count as f64 / 10.0, "completed": count - failed, "failed": failed,
        "total_input_tokens": 10 * count, "total_output_tokens": (gaps + 1) * count, "request_throughput": 9.5,
        "output_throughput": 100.0, "total_token_throughput": 200.0, "input_lens": vec![10; count],
        "output_lens": vec![gaps + 1; count], "ttfts": list("ttft"), "itls": list("itl"), "latencies": list("latency"),
        "start_times": list("start"), "queue_times": vec![0.0; count], "errors": list("error"), "median_ttft_ms": 300.0,
        "median_tpot_ms": 10.0,
    })
}

/// The charts of a page, as its script gets them.
fn charts(page: &str) -> Vec<Value> {
    let (_, data) = page
        .split_once("type=\"application/json\">")
        .expect("a page with charts");
    let (data, _) = data.split_once("</script>").expect("the end of the data");
    let charts: Vec<Value> = serde_json::from_str(data).expect("JSON");
    for number in 0..charts.len() {
        assert_eq!(
            page.matches(&format!("data-chart=\"{number}\"")).count(),
            1,
            "chart {number}"
        );
    }
    charts
}

/// The texts of the ticks of an axis on a wide page.
fn ticks(axis: &Value) -> Vec<&str> {
    let ticks = axis["ticks"][0].as_array().expect("ticks").iter();
    ticks.filter_map(|tick| tick[1].as_str()).collect()
}

/// The points of a series.
fn points(series: &Value) -> Vec<(f64, f64)> {
    let numbers = |key: &str| {
        series[key]
            .as_array()
            .expect("numbers")
            .iter()
            .map(|number| number.as_f64().expect("a number"))
    };
    numbers("x").zip(numbers("y")).collect()
}

fn fails(one: &mut Value, cause: &str) {
    for (key, value) in [
        ("ttft", json!(0.0)),
        ("latency", json!(0.0)),
        ("itl", json!([])),
        ("error", json!(cause)),
    ] {
        one[key] = value;
    }
}

#[test]
fn texts_from_servers_are_escaped() {
    let mut file = result(4, 3, |index, one| {
        if index > 1 {
            fails(one, HOSTILE);
        }
    });
    file["model_id"] = json!(HOSTILE);
    file["xpyd"] = json!({"version": HOSTILE, "seed": HOSTILE});
    file[HOSTILE] = json!(HOSTILE);
    let page = of_file(&file.to_string()).unwrap();
    assert!(page.contains("&lt;script&gt;alert(1)"), "the cause is shown");
    assert!(page.contains(r"\u003cscript\u003ealert(1)"), "and given to the script");
    // The script's data and the script itself.
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script>").count(), 2);
    assert!(!page.contains("<img"));
}

#[test]
fn a_page_loads_nothing() {
    let page = of_file(&result(3, 3, |_, _| ()).to_string()).unwrap();
    // The origin in the first line of the chart library.
    let origin = "https://github.com/leeoniya/uPlot ";
    assert_eq!(page.matches(origin).count(), 1);
    let without_names = page.replace(origin, "").replace("http-equiv", "");
    for outside in [
        "http", "src=", "href=", "url(", "@import", "fetch(", "XMLHttp", "import(",
    ] {
        assert!(!without_names.contains(outside), "`{outside}` is in the page");
    }
}

#[test]
fn pages_of_many_requests_are_sampled() {
    let file = result(12_000, 20, |index, one| {
        if index % 3 == 0 {
            fails(one, &format!("cause{index}: {}", "long ".repeat(200)));
        }
    });
    let page = of_file(&file.to_string()).unwrap();
    assert!(page.len() < 5_000_000, "{} bytes", page.len());
    // The bound on every series, whatever the size of the run.
    for panel in charts(&page)
        .iter()
        .filter_map(|chart| chart["panels"].as_array())
        .flatten()
    {
        for series in panel["series"].as_array().unwrap() {
            assert!(points(series).len() <= 3000, "{}", panel["title"]);
        }
    }
    assert!(page.contains("of 12\u{202f}000 requests are drawn"));
    assert!(page.contains("Further causes: 3980"));
}

#[test]
fn a_file_of_vllms_client_gives_a_page_with_or_without_details() {
    let mut file: Value = serde_json::from_str(crate::fixtures::fixture!("captures/everything.json")).unwrap();
    let page = of_file(&file.to_string()).unwrap();
    assert!(page.contains("Every request") && page.contains("4 of 20 requests failed, by cause"));
    // As vLLM leaves a file without `--save-detailed`.
    for list in [
        "input_lens",
        "output_lens",
        "ttfts",
        "itls",
        "start_times",
        "generated_texts",
        "errors",
    ] {
        file.as_object_mut().unwrap().remove(list);
    }
    let page = of_file(&file.to_string()).unwrap();
    assert!(page.contains("--save-detailed") && page.contains("median_ttft_ms"));
}

#[test]
fn of_appended_results_the_last_one_is_shown() {
    let mut first = result(2, 2, |_, _| ());
    first["model_id"] = json!("first");
    let text = format!("{first}\n{}\n\n", result(2, 2, |_, _| ()));
    assert!(of_file(&text).unwrap().contains("tiny at 10 req/s"));
}

#[test]
fn invalid_results_are_rejected_with_the_reason() {
    for (text, reason) in [
        ("", "the file is empty"),
        ("{", "is not a result"),
        ("[1]", "is not a result"),
        ("{}", "it has no `duration`"),
        (r#"{"duration": 1, "ttfts": "none"}"#, "is not a result"),
    ] {
        let error = of_file(text).unwrap_err().to_string();
        assert!(
            error.starts_with("the file is") && error.contains(reason),
            "{text}: {error}"
        );
    }
}

#[test]
fn extreme_numbers_do_not_break_a_page() {
    for value in [json!(-1.0), json!(0.0), json!(1e300), json!(1e-300)] {
        let file = result(130, 5, |index, one| {
            for key in ["ttft", "latency", "start"] {
                if index % 2 == 0 {
                    one[key] = value.clone();
                }
            }
            one["itl"] = json!([value, value, 0.01]);
        });
        let page = of_file(&file.to_string()).unwrap();
        assert!(!page.contains("NaN") && !page.contains("inf "), "{value}");
        assert!(page.len() < 5_000_000);
    }
}

#[test]
fn requests_that_share_a_lane_do_not_overlap() {
    let file = result(600, 40, |_, _| ());
    let run = Run::read(&file.to_string()).unwrap();
    let values = Values::of(&run);
    let timeline = Timeline::of(&run, &values.gaps);
    let data = timeline.data();
    let mut ends = std::collections::HashMap::new();
    for row in data["rows"].as_array().unwrap() {
        let phases = row["phases"].as_array().unwrap();
        let (start, length) = (
            row["start"].as_i64().unwrap(),
            phases.iter().filter_map(Value::as_i64).sum::<i64>(),
        );
        let end = ends.insert(row["lane"].as_u64().unwrap(), start + length);
        assert!(end.is_none_or(|end| end <= start), "{row}");
    }
    // 700 ms each, ten a second: seven at once, and one more because neighbours are kept apart.
    assert!((7..=8).contains(&ends.len()), "{} lanes", ends.len());
}

#[test]
fn a_run_that_is_not_valid_says_so_before_any_number() {
    let mut file = result(4, 3, |_, _| ());
    file["xpyd"] = json!({"valid": false, "reasons": ["the client was 80 ms late", HOSTILE], "dropped": 2, "unsent": 1,
        "statistics": {"all": {"ttft_ms": {"mean": {"value": 300.0, "interval": [290.0, 311.5]}}}}});
    let page = of_file(&file.to_string()).unwrap();
    let (banner, numbers) = page.split_once("class=\"headline\"").unwrap();
    assert!(banner.contains("INVALID") && banner.contains("80 ms late") && banner.contains("Stopped early"));
    assert!(numbers.contains("290.00 – 311.50"), "the interval of the mean");
    assert!(!page.contains("<img"));
}

#[test]
fn results_of_several_runs_have_pages() {
    let run = |asked: f64, ttft: f64| {
        json!({"asked": asked, "sent": asked, "served": asked * 0.9, "failed": 0, "overloaded": asked > 3.0, "valid": true,
            "why_invalid": null, "result": {"request_throughput": asked, "median_ttft_ms": ttft, "p99_ttft_ms": 2.0 * ttft,
            "xpyd": {"objectives": {"ttft": 500}}}})
    };
    let sweep = json!({"xpyd_bench": "sweep", "date": "20261122-205142", "model_id": HOSTILE, "axis": "rate", "stopped": HOSTILE,
        "points": [run(1.0, 300.0), run(2.0, 400.0), run(4.0, 4000.0), {"asked": "inf"}, 7]});
    let page = of_file(&sweep.to_string()).unwrap();
    assert!(
        page.contains("objective 500") && page.contains("more was sent than served") && page.contains("all at once")
    );
    let search = json!({"xpyd_bench": "find-max", "model_id": "m", "objectives": {"ttft": 500}, "attainment": 0.99, "rate": 2.5,
        "fails_at": 2.75, "ending": "found", "probes": [{"rate": 2.0, "verdict": "pass", "good": 1.0, "ttft_ms": 410.0},
        {"rate": 4.0, "verdict": "fail", "good": 0.4, "ttft_ms": 9000.0, "missed": {"ttft": 12}}]});
    let page = of_file(&search.to_string()).unwrap();
    assert!(page.contains("2.50 req/s") && page.contains("12 missed ttft") && page.contains("ttft ≤ 500 ms"));
    let compare = json!({"xpyd_bench": "compare", "a": {"file": HOSTILE, "model_id": "m"}, "b": {"file": "b.json", "model_id": "m"},
        "caveats": [HOSTILE], "measures": {"mean_ttft_ms": {"a": 300.0, "b": 330.0, "change": 0.1, "interval": [0.05, 0.15],
        "verdict": "slower"}, "p99_ttft_ms": {"a": 1.0, "b": null, "change": null, "interval": null, "verdict": null}}});
    let page_of_compare = of_file(&compare.to_string()).unwrap();
    assert!(page_of_compare.contains("+5.0 to +15.0 %") && page_of_compare.contains("Not directly comparable"));
    for page in [page, page_of_compare, of_file(&sweep.to_string()).unwrap()] {
        assert_eq!(page.matches("<script").count(), 2);
        assert!(!page.contains("<img"));
    }
    assert!(of_file(r#"{"xpyd_bench": "something"}"#).is_err());
}

#[test]
fn a_page_shows_setup_and_simulation() {
    let mut file = result(4, 3, |_, _| ());
    let setup = json!({"command": "xpyd bench --header 'Authorization=<redacted>'", "host": {"name": "box", "cores": 16,
        "memory_bytes": 64_u64 << 30}, "xpyd": "0.1.0", "server": {"url": "localhost:9100", "version": "0.33.0", "simulated": true},
        "fleet": {"profile": "2p2d-nixl", "connector": "nixl", "prefill_engines": 2, "decode_engines": 2, "gpus": null,
        "versions": null}});
    file["xpyd"] = json!({"valid": true, "setup": setup});
    let page = of_file(&file.to_string()).unwrap();
    let (head, rest) = page.split_once("class=\"headline\"").unwrap();
    assert!(
        head.contains("Simulated engines") && head.contains("simulated</h1>"),
        "{head}"
    );
    for text in [
        "2p2d-nixl",
        "2 prefill, 2 decode",
        "box, 16 cores, 64 GiB",
        "xpyd bench --header",
    ] {
        assert!(rest.contains(text), "{text}");
    }
    file["xpyd"]["setup"]["server"]["simulated"] = json!(false);
    let page = of_file(&file.to_string()).unwrap();
    assert!(page.contains("vLLM 0.33.0") && !page.contains("Simulated"));
    let sweep = json!({"xpyd_bench": "sweep", "axis": "rate", "points": [], "setup": setup});
    assert!(of_file(&sweep.to_string()).unwrap().contains("Simulated engines"));
}

#[test]
fn an_unfinished_search_says_at_least() {
    let search = |ending: &str, rate: Value, fails_at: Value| {
        let probe = json!({"rate": 1.0, "verdict": "pass", "good": 1.0, "ttft_ms": 410.0});
        let document = json!({"xpyd_bench": "find-max", "objectives": {"ttft": 500}, "attainment": 0.99, "rate": rate,
            "fails_at": fails_at, "ending": ending, "probes": [probe]});
        of_file(&document.to_string()).unwrap()
    };
    let page = search("time", json!(1.0), json!(null));
    assert!(
        page.contains("At least <b>1.00 req/s</b>") && page.contains("the time limit was reached"),
        "{page}"
    );
    assert!(!page.contains("The highest rate that meets"));
    // The numbers below the one point, each once.
    let charts = charts(&page);
    let ticks = ticks(&charts[0]["x"]);
    let mut distinct = ticks.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert!(distinct.len() > 1 && distinct.len() == ticks.len(), "{ticks:?}");
    let page = search("client limit", json!(null), json!(null));
    assert!(page.contains("Whether any rate meets the objectives is unknown") && page.contains("load generator"));
    let page = search("found", json!(1.0), json!(1.1));
    assert!(page.contains("The highest rate that meets the objectives is"));
}

#[test]
fn sweeps_and_comparisons_have_a_headline() {
    let point = |asked: f64, overloaded: bool| json!({"asked": asked, "served": asked, "overloaded": overloaded, "valid": true, "result": {}});
    let sweep = json!({"xpyd_bench": "sweep", "axis": "rate", "points": [point(4.0, false), point(8.0, false), point(16.0, true)]});
    let page = of_file(&sweep.to_string()).unwrap();
    assert!(
        page.contains("The server keeps up with 8 req/s, and falls behind at 16."),
        "{page}"
    );
    let measure = |label: &str, change: f64, verdict: &str| {
        json!({"label": label, "a": 1.0, "b": 1.0 + change, "change": change,
        "interval": [change, change], "verdict": verdict})
    };
    let compare = json!({"xpyd_bench": "compare", "a": {}, "b": {}, "measures": {
        "mean_ttft_ms": measure("Mean TTFT (ms)", 0.16, "slower"), "mean_tpot_ms": measure("Mean TPOT (ms)", -0.03, "faster")}});
    let page = of_file(&compare.to_string()).unwrap();
    assert!(
        page.contains("B against A: 16.0 % slower to the first token, 3.0 % faster per later token."),
        "{page}"
    );
    assert!(page.contains("Mean TTFT (ms)") && !page.contains("mean_ttft_ms"));
    assert!(page.contains("class=\"text worse\"") && page.contains("class=\"text better\""));
}

#[test]
fn a_run_draws_its_objectives_distributions_and_course() {
    let mut file = result(40, 20, |index, one| {
        if index == 30 {
            fails(one, "no");
        }
        if index == 39 {
            one["ttft"] = json!(6.0);
            one["latency"] = json!(6.2);
        }
    });
    file["xpyd"] = json!({"objectives": {"ttft": 400}});
    let page = of_file(&file.to_string()).unwrap();
    let charts = charts(&page);
    let timeline = &charts[0];
    assert_eq!(
        (timeline["rows"].as_array().unwrap().len(), &timeline["ownRows"]),
        (40, &json!(true))
    );
    let first_token = &charts[1];
    // 300 ms to 6 s: a logarithmic axis, with the unit at its last tick.
    assert_eq!(first_token["x"]["log"], true);
    assert!(
        ticks(&first_token["x"]).last().unwrap().ends_with(" ms"),
        "{}",
        first_token["x"]
    );
    let marks = first_token["panels"][0]["marks"].as_array().unwrap();
    let texts: Vec<&str> = marks.iter().filter_map(|mark| mark["text"].as_str()).collect();
    assert_eq!(texts[0], "median 300 ms");
    assert!(
        texts[2].contains("within 400 ms") && marks[2]["value"] == 400.0,
        "{texts:?}"
    );
    let bars = points(&first_token["panels"][0]["series"][0]);
    assert_eq!(
        bars.iter().map(|(_, count)| *count).sum::<f64>().to_string(),
        "39",
        "every answer is in a bar"
    );
    assert_eq!(first_token["panels"][0]["series"][1]["kind"], "rug");
    let curve = points(&first_token["panels"][1]["series"][0]);
    assert_eq!((curve[0].1, curve.last().unwrap().1), (0.0, 1.0));
    let over_time = charts.last().unwrap()["panels"].as_array().unwrap();
    let in_flight = points(&over_time[1]["series"][0]);
    // The first request is sent at once, and the last answer ends the run.
    assert_eq!((in_flight[0], in_flight.last().unwrap().1), ((0.0, 1.0), 0.0));
    assert!(
        in_flight.iter().all(|(_, count)| (0.0..=6.0).contains(count)),
        "{in_flight:?}"
    );
    let [dots, crosses] = [0, 1].map(|place| points(&over_time[2]["series"][place]));
    assert_eq!((dots.len(), crosses), (39, vec![(3.0, 0.0)]));
    assert_eq!(over_time[2]["marks"][0]["value"], 400.0);
}

#[test]
fn stages_are_stacked_up_to_the_first_token() {
    let mut file = result(3, 2, |_, _| ());
    file["xpyd"] = json!({"request_stages": vec![json!({"pair": "prefiller1 → decoder1",
        "ms": {"prefill_queue": 100.0, "prefill_compute": 150.0, "handoff": 50.0}}); 3]});
    let charts = charts(&of_file(&file.to_string()).unwrap());
    let stages = charts.iter().find(|chart| chart["columns"].is_array()).unwrap();
    assert_eq!(stages["columns"], json!(["Request 0", "Request 1", "Request 2"]));
    assert_eq!(ticks(&stages["x"]), ["0", "1", "2"]);
    let series = stages["panels"][0]["series"].as_array().unwrap();
    let spans: Vec<(&Value, &Value)> = series.iter().map(|stage| (&stage["base"][1], &stage["y"][1])).collect();
    let expected = [(0.0, 100.0), (100.0, 250.0), (250.0, 300.0)].map(|(base, top)| (json!(base), json!(top)));
    assert_eq!(
        spans,
        expected.iter().map(|(base, top)| (base, top)).collect::<Vec<_>>()
    );
}

#[test]
fn sweeps_and_comparisons_draw_every_point_with_a_value() {
    let point = |asked: f64, ttft: Value, valid: bool| json!({"asked": asked, "valid": valid, "result": {"median_ttft_ms": ttft, "xpyd": {"objectives": {"ttft": 500}}}});
    // Not in order, over a factor of 16, one value missing, and one far beyond the objective.
    let sweep = json!({"xpyd_bench": "sweep", "axis": "rate", "points": [point(16.0, json!(90_000), false),
        point(1.0, json!(100), true), point(4.0, json!(null), true), point(2.0, json!(200), true)]});
    let page = of_file(&sweep.to_string()).unwrap();
    let drawn = charts(&page);
    assert_eq!(drawn[0]["x"]["log"], true);
    let panels = drawn[0]["panels"].as_array().unwrap();
    assert_eq!(panels.len(), 1, "a panel without values is left out");
    let series = panels[0]["series"].as_array().unwrap();
    assert_eq!(points(&series[0]), [(1.0, 100.0), (2.0, 200.0), (16.0, 90_000.0)]);
    assert_eq!(points(&series[1]), [(1.0, 100.0), (2.0, 200.0)]);
    assert_eq!(points(&series[2]), [(16.0, 90_000.0)], "a cross for the invalid run");
    assert!(
        panels[0]["y"]["max"].as_f64().unwrap() < 5000.0,
        "the axis ends at six objectives"
    );
    assert_eq!(panels[0]["marks"][0]["text"], "objective 500");
    let compare = json!({"xpyd_bench": "compare", "a": {}, "b": {}, "measures": {
        "one": {"a": 1.0, "b": 1.1, "change": 0.1, "interval": [0.05, 0.15]}, "two": {"a": 1.0, "b": 9.0, "change": 8.0},
        "three": {"a": 1.0, "b": null, "change": null}}});
    let drawn = charts(&of_file(&compare.to_string()).unwrap());
    let panel = &drawn[0]["panels"][0];
    assert_eq!(ticks(&panel["y"]), ["one", "two"]);
    assert_eq!(
        (&panel["y"]["flip"], drawn[0]["x"]["max"].as_f64()),
        (&json!(true), Some(216.0))
    );
    let series = &panel["series"];
    assert_eq!(
        (points(&series[0]), &series[0]["to"]),
        (vec![(5.0, 0.5)], &json!([15.0]))
    );
    assert_eq!(
        (points(&series[1]), points(&series[2])),
        (vec![(10.0, 0.5)], vec![(800.0, 1.5)])
    );
}
