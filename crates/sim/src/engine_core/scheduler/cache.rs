//! Looks up prompts before they are computed: in LMCache's receive buffer and in the engine's cache server.

use std::sync::Arc;

use super::{Connector, Core, Loaded, corrupt};
use crate::engine_core::sequence::Sequence;
use crate::kv::params::Tag;
use crate::log::Process;

impl Core {
    /// Loads the records of this prompt that other engines pushed.
    pub(super) fn retrieve(&mut self, sequence: &mut Sequence, tag: &Tag) {
        let Connector::Receiver(receiver) = &self.parts.connector else {
            return;
        };
        let prompt = &sequence.request.prompt;
        self.parts.metrics.external_queries.add(prompt.len());
        sequence.loaded = receiver.retrieve(prompt, tag);
        corrupt(&mut self.garbled_loads, &mut sequence.loaded);
        // The last token of a prompt is computed again.
        sequence.cached_tokens = sequence.loaded.len().min(prompt.len() - 1);
        self.parts.metrics.external_hits.add(sequence.loaded.len());
        let message = format!(
            "Reqid: {}, Total tokens {}, LMCache hit tokens: {}",
            sequence.request.id,
            prompt.len(),
            sequence.loaded.len()
        );
        let place = "vllm_v1_adapter.py:1475";
        self.parts.log.info(Process::EngineCore, place, &message);
    }

    /// Looks up the prompt in the cache server while the sequence waits; without a server it continues at once.
    pub(super) fn look_up(&mut self, mut sequence: Sequence) {
        let Some(cache) = self.parts.cache.clone() else {
            self.waiting.push_back(sequence);
            return;
        };
        self.parts.metrics.external_queries.add(sequence.request.prompt.len());
        self.loads.spawn(async move {
            let request = &sequence.request;
            sequence.loaded = cache.look_up(request.cache_salt.as_deref(), &request.prompt).await;
            sequence.cached_tokens = sequence.loaded.len().min(request.prompt.len() - 1);
            Loaded::Cached(Box::new(sequence))
        });
    }

    /// Stores the records of a whole prompt in the cache server.
    pub(super) fn store(&mut self, sequence: &Sequence, records: &[u64]) {
        if let Some(cache) = self.parts.cache.clone() {
            let request = &sequence.request;
            let (prompt, salt) = (Arc::clone(&request.prompt), request.cache_salt.clone());
            let records = records.to_vec();
            self.loads.spawn(async move {
                cache.store(salt.as_deref(), &prompt, records).await;
                Loaded::Stored
            });
        }
    }
}
