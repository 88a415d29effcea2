//! Service level objectives, and whether an answer meets them. Pure.

use std::str::FromStr;

use crate::record::Answer;

/// An objective: a latency of at most this many milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// The latency that it limits.
    pub latency: ObjectiveLatency,
    /// The limit in milliseconds.
    pub milliseconds: f64,
}

/// The latencies that have one value per request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectiveLatency {
    /// Time to first token.
    Ttft,
    /// Time per output token; 0 for an answer of one token.
    Tpot,
    /// End-to-end latency.
    E2el,
}

impl ObjectiveLatency {
    /// Its name on the command line and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::E2el => "e2el",
        }
    }
}

/// An invalid objective.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ObjectiveError {
    /// Not of the form `name:milliseconds`.
    #[error("an objective is written `name:milliseconds`, as in `ttft:500`")]
    Form,
    /// An unknown latency.
    #[error("`{name}` is not an objective{instead}", name = .0, instead = instead(.0))]
    Name(String),
    /// Not a number of milliseconds.
    #[error("`{0}` is not a number of milliseconds from 0 up")]
    Milliseconds(String),
}

/// The nearest valid name, or all of them.
fn instead(name: &str) -> String {
    const NAMES: [&str; 3] = ["ttft", "tpot", "e2el"];
    let name = name.to_lowercase();
    let near = NAMES
        .into_iter()
        .min_by_key(|known| strsim::damerau_levenshtein(known, &name));
    match near.filter(|known| strsim::damerau_levenshtein(known, &name) <= 2) {
        // `itl` is a latency, not a typing error.
        Some(known) if name != "itl" => format!("; did you mean `{known}`?"),
        _ => ": it is one of `ttft`, `tpot`, `e2el`".to_owned(),
    }
}

impl FromStr for Objective {
    type Err = ObjectiveError;

    /// Parses `ttft:500`.
    fn from_str(text: &str) -> Result<Self, ObjectiveError> {
        let (name, milliseconds) = text.split_once(':').ok_or(ObjectiveError::Form)?;
        let latency = match name {
            "ttft" => ObjectiveLatency::Ttft,
            "tpot" => ObjectiveLatency::Tpot,
            "e2el" => ObjectiveLatency::E2el,
            other => return Err(ObjectiveError::Name(other.to_owned())),
        };
        let number = milliseconds.parse().ok().filter(|number: &f64| *number >= 0.0);
        let milliseconds = number.ok_or_else(|| ObjectiveError::Milliseconds(milliseconds.to_owned()))?;
        Ok(Self { latency, milliseconds })
    }
}

/// Objectives as in the result file: milliseconds by latency.
pub fn to_json(objectives: &[Objective]) -> serde_json::Value {
    let entries = objectives.iter().map(|objective| {
        let name = objective.latency.name().to_owned();
        (name, serde_json::json!(objective.milliseconds))
    });
    serde_json::Value::Object(entries.collect())
}

impl Objective {
    /// Whether an answer meets it.
    pub fn is_met(&self, answer: &Answer) -> bool {
        let seconds = match self.latency {
            ObjectiveLatency::Ttft => answer.first_token.as_secs_f64(),
            ObjectiveLatency::Tpot => answer.time_per_output_token().unwrap_or(0.0),
            ObjectiveLatency::E2el => answer.latency.as_secs_f64(),
        };
        self.milliseconds / 1000.0 >= seconds
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn met(objective: &str, answer: &Answer) -> bool {
        objective.parse::<Objective>().unwrap().is_met(answer)
    }

    #[test]
    fn an_objective_is_met_up_to_and_including_its_limit() {
        let answer = Answer {
            first_token: Duration::from_millis(500),
            latency: Duration::from_millis(700),
            completion_tokens: Some(11),
            ..Answer::default()
        };
        assert!(met("ttft:500", &answer) && !met("ttft:499.9", &answer));
        assert!(met("tpot:20", &answer) && !met("tpot:19", &answer));
        assert!(met("e2el:700", &answer) && !met("e2el:0", &answer));
    }

    #[test]
    fn one_token_answers_have_zero_tpot() {
        let answer = Answer {
            completion_tokens: Some(1),
            latency: Duration::from_secs(9),
            ..Answer::default()
        };
        assert!(met("tpot:0", &answer));
    }

    #[test]
    fn invalid_objectives_are_rejected() {
        let refused = |text: &str| text.parse::<Objective>().unwrap_err();
        assert_eq!(refused("ttft"), ObjectiveError::Form);
        assert_eq!(refused("itl:5"), ObjectiveError::Name("itl".to_owned()));
        assert_eq!(
            refused("tfft:5").to_string(),
            "`tfft` is not an objective; did you mean `ttft`?"
        );
        assert!(refused("itl:5").to_string().ends_with("one of `ttft`, `tpot`, `e2el`"));
        for milliseconds in ["-1", "NaN", "fast", ""] {
            assert_eq!(
                refused(&format!("ttft:{milliseconds}")),
                ObjectiveError::Milliseconds(milliseconds.to_owned())
            );
        }
    }
}
