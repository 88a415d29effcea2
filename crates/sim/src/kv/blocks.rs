//! The paged KV cache of an engine: a pool of blocks with the records of the tokens of sequences.
//!
//! A block is overwritten when it is freed. A real engine keeps the bytes until the block is used again, so reading a
//! freed block fails only sometimes. Here it always fails, so that every test notices.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};

use crate::engine_core::tokens::{KvState, mix};

/// Tokens per block: vLLM's default on a GPU.
pub(crate) const BLOCK_TOKENS: usize = 16;

/// The blocks of an engine.
#[derive(Debug, Clone)]
pub(crate) struct BlockPool {
    state: Arc<Mutex<PoolState>>,
    total: usize,
}

#[derive(Debug)]
struct PoolState {
    records: Vec<u64>,
    free: VecDeque<u32>,
    /// Makes each overwrite different.
    scrubbed: u64,
}

impl BlockPool {
    /// A pool for `tokens` tokens.
    pub(crate) fn new(tokens: u32) -> Self {
        let total = (tokens / 16).max(1);
        Self {
            state: Arc::new(Mutex::new(PoolState {
                records: vec![0; total as usize * BLOCK_TOKENS],
                free: (0..total).collect(),
                scrubbed: 0,
            })),
            total: total as usize,
        }
    }

    /// Reserves blocks for `tokens` tokens. `None` if too few are free.
    pub(crate) fn reserve(&self, tokens: usize) -> Option<Blocks> {
        let count = tokens.div_ceil(BLOCK_TOKENS);
        let mut state = self.lock();
        if state.free.len() < count {
            return None;
        }
        let ids = state.free.drain(..count).collect();
        Some(Blocks {
            pool: self.clone(),
            ids,
        })
    }

    /// Used share of the pool, 0 to 1.
    pub(crate) fn usage(&self) -> f64 {
        1.0 - self.lock().free.len() as f64 / self.total as f64
    }

    /// The number of blocks.
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// The bytes of any blocks, whether they are free or not. `None` if an id is out of range.
    pub(crate) fn read(&self, ids: &[u32]) -> Option<Bytes> {
        let state = self.lock();
        let mut bytes = BytesMut::with_capacity(ids.len() * BLOCK_TOKENS * KvState::RECORD_BYTES);
        for id in ids {
            let start = *id as usize * BLOCK_TOKENS;
            for record in state.records.get(start..start + BLOCK_TOKENS)? {
                bytes.put_u64_le(*record);
            }
        }
        Some(bytes.freeze())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The blocks of one sequence; dropping them frees and overwrites them.
#[derive(Debug)]
pub(crate) struct Blocks {
    pool: BlockPool,
    ids: Vec<u32>,
}

impl Blocks {
    /// Their ids in the order of the sequence.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Writes the records of a sequence, from its first token.
    pub(crate) fn write(&self, records: &[u64]) {
        let mut state = self.pool.lock();
        for (id, block) in self.ids.iter().zip(records.chunks(BLOCK_TOKENS)) {
            let start = *id as usize * BLOCK_TOKENS;
            state.records[start..start + block.len()].copy_from_slice(block);
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        for id in &self.ids {
            state.scrubbed += 1;
            let noise = mix(state.scrubbed, u64::from(*id));
            let start = *id as usize * BLOCK_TOKENS;
            state.records[start..start + BLOCK_TOKENS].fill(noise);
        }
        let ids = std::mem::take(&mut self.ids);
        state.free.extend(ids);
    }
}

/// The records in received bytes; an incomplete last record is ignored.
pub(crate) fn records(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes
        .chunks_exact(KvState::RECORD_BYTES)
        .map(|record| u64::from_le_bytes(record.try_into().expect("chunks are as long as a record")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_readable_until_freed() {
        let pool = BlockPool::new(64);
        let written: Vec<u64> = (1..=20).collect();
        let blocks = pool.reserve(20).unwrap();
        blocks.write(&written);
        let ids = blocks.ids().to_vec();
        let before: Vec<u64> = records(&pool.read(&ids).unwrap()).take(20).collect();
        assert_eq!(before, written);
        assert!((pool.usage() - 0.5).abs() < 1e-9);
        drop(blocks);
        let after: Vec<u64> = records(&pool.read(&ids).unwrap()).take(20).collect();
        assert!(after.iter().zip(&written).all(|(after, before)| after != before));
        assert!(pool.usage().abs() < 1e-9);
    }

    #[test]
    fn full_pools_and_invalid_ids_give_none() {
        let pool = BlockPool::new(32);
        let all = pool.reserve(32).unwrap();
        assert!(pool.reserve(1).is_none());
        assert!(pool.read(&[2]).is_none());
        drop(all);
        assert!(pool.reserve(1).is_some());
    }
}
