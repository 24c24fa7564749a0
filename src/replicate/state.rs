//! What a source keeps in its state directory: the record of a run, its reports, and who this source is.

pub mod generation;
pub mod handover_record;
pub(super) mod history;
pub mod journal;
pub(crate) mod locked_dir;
pub mod record;
pub mod report;
pub mod source;
pub mod stores;
