//! What to do next, as facts: which step helps, and what it is about.
//!
//! The library names no command of any program. A program that speaks to a person puts an advice into its own words
//! ([`super::Words`]); ours does so in `cli/speak/advice.rs`. Words that need no command stay plain text.
//!
//! An advice travels beside its words in a failure of the wire (docs/formats/wire.md). Names below are part of that
//! format: they are added, never renamed. A peer that does not know one shows the words instead.

use serde::{Deserialize, Deserializer, Serialize};
use std::borrow::Cow;

/// The next step for the person or the program that got an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Advice {
    /// Plain words, in the imperative, that name no command of ours.
    #[serde(skip)]
    Text(Cow<'static, str>),
    /// Give a run what it lacks.
    Run(Run),
    /// Give the overlays of a run room, or another place.
    Overlay(Overlay),
    /// Clean up what an earlier run left.
    Repair(Repair),
    /// Decide that this host is the source of a replica.
    TakeOver(TakeOver),
    /// Look after the points of a store.
    Store(Store),
    /// Go on with a failover, or call it off.
    Failover(Failover),
    /// Go on with a handover or a migration, or call it off.
    Handover(Handover),
    /// Read or write a plain image, a patch or a protected file in another way.
    Image(Image),
    /// Change something about a host, its agent or its daemon.
    Host(Host),
}

/// A run, and what it lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Run {
    /// The target has no point: a run makes the first one.
    FirstPoint,
    /// The point lacks something that a new one has.
    NewPoint,
    /// Mend the image, or exclude the disk.
    ExcludeDisk,
    /// The disk belongs to the running instance only: define it, detach it, or exclude it.
    DefineDisk,
    /// Install the guest agent, or replicate without it.
    InstallGuestAgent,
    /// Look after the guest agent, or replicate without it.
    WithoutGuestAgent,
}

/// The place of overlays and scratch files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlay {
    /// Less room than the run may need.
    MakeRoom,
    /// A block device has no directory for its overlay.
    NeedsDirectory,
    /// The directory is read-only.
    AnotherDirectory,
    /// The file system does not take names that long.
    AnotherFileSystem,
    /// The guest writes faster than was foreseen.
    LargerFileSystem,
    /// The overlay may not grow that large.
    AllowMoreBytes,
    /// The overlay may not get that old.
    AllowMoreTime,
    /// QEMU stopped the guest: the overlays had no room.
    GuestStopped,
}

/// The way out of a domain that was left half-way; most of them end in a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repair {
    /// Ask what was found, and what to do about it.
    Explain,
    /// The freeze failed, and so did the cleaning up after it.
    ExplainLeftovers,
    /// The domain resumes from a saved memory image that needs the overlay.
    StartSaved,
    /// A block job that is not ours runs on the disk.
    EndBlockJob,
    /// Compare the chain with the record.
    CompareWithRecord,
    /// Plug the disk in again.
    PlugIn,
    /// A running domain can commit the middle layer of a chain.
    Start,
    /// The host that has the domain now can repair it.
    OnOtherHost,
    /// QEMU may not write to the base until the guest was off.
    ShutOff,
    /// libvirt believes in the base until the domain was off.
    ShutDown,
    /// QEMU lacks a right on the base.
    CheckRights,
}

/// Why this host may become the source of a replica that follows another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TakeOver {
    /// Both sides may have data that counts.
    IfThisSideCounts,
    /// The replica was failed over, or it follows another host since.
    IfMovedHere,
    /// The domain moved to this host, unless it is a clone.
    IfNoClone,
    /// The same host, with another state directory.
    IfStateWasLost,
}

/// A store and its points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    /// List the points. `root`: of the store, if it is on the host that reports the error.
    ListPoints {
        /// Root of the store, if it is on the host that reports the error.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        root: Option<String>,
    },
    /// The target's image differs after a run: verify it.
    VerifyTarget,
    /// Verify says what of a point is damaged.
    VerifyPoint,
    /// Verify says which blocks are damaged; only a fresh copy helps.
    VerifyAndSendAnew,
    /// Verify says which points are damaged; this act changed nothing.
    VerifyUnchanged,
    /// The account of the scrubs cannot be read: begin a new one.
    ScrubAnew,
    /// A generation is wrong, and only the target's operator can correct it.
    SetGeneration,
    /// Only the generations of this manifest are wrong.
    SetGenerationHere,
    /// The peer's generation is wrong.
    SetGenerationThere,
    /// The pin belongs to the target's operator.
    UnpinThere,
    /// The target keeps points of this age.
    LowerMinAge,
    /// Remove points.
    Prune,
    /// The file of a point is damaged: write another one.
    WritePointAnew,
    /// Points are missing between the newest one here and the one in the file.
    BringPointsBetween,
    /// There is no store in this directory.
    Create {
        /// Directory that is to become a store.
        root: String,
    },
    /// The store that was here is gone.
    Lost {
        /// Directory in which the store was.
        root: String,
    },
    /// There is no such replica in this store: is it the right one?
    RightStore,
}

/// A failover and what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failover {
    /// Ask what the definition needs on this host.
    AskReady,
    /// Find out how an element of a definition is written.
    AskElement,
    /// Leave the domain off at the source; the target can undo the failover.
    LeaveOffOrUndo,
    /// Finish the failback.
    FinishFailback,
    /// Commit the failover first.
    Commit,
    /// Finish undoing the failover.
    FinishUndo,
    /// Undo the failover, or do not choose a point.
    UndoOrHead,
    /// The order was called off: begin anew.
    BeginAnew,
    /// Give the domain images of its own first.
    DetachFirst,
    /// A detach goes on where it stopped.
    DetachAgain,
    /// A copy ended early: look into why, then go on.
    DetachAfterLook,
    /// A detach began, and the images may be a mixture.
    FinishDetach,
    /// A detach began with another image format.
    DetachSameFormat,
    /// An older copy of the domain is here: keep its data as a point, and remove it.
    GiveWay,
    /// A domain of the same UUID is here under another name: the same, by its UUID.
    GiveWayByUuid,
    /// Limit the chain of the newest point.
    ShortenChain,
    /// Bring programs here up to the source's versions, and try it.
    UpdateTpmAndDrill,
    /// Keep the firmware alike on both hosts, and try it.
    AlikeFirmwareAndDrill,
    /// The guest lacks a device: try it.
    Drill,
    /// The newest point is damaged: find the newest whole one.
    OlderPoint,
    /// Map the network here.
    MapNetwork,
}

/// A handover to a target, planned failover and migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handover {
    /// A paused guest cannot shut down.
    ResumeOrForceOff,
    /// The guest did not shut down in time.
    WaitOrForceOff,
    /// The domain runs on both sides.
    ShutOffHere {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// The domain lives on the target.
    LivesThere {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// The target did not answer: ask again.
    AskAgain {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// As [`Handover::AskAgain`], while a call-off is still possible.
    AskAgainOrAbort {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// A call-off was begun: go on with it.
    Abort {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// The handover was cut short before the target was asked.
    GoOnOrAbort {
        /// Name of the domain.
        domain: String,
        /// The target's URL.
        to: String,
    },
    /// The guest wrote at the target: bring that home, or lose it.
    BringHomeOrLose,
    /// The migration does not converge.
    Converge,
}

/// Plain images, patches, and files that are encrypted or signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Image {
    /// The image may read files of this directory only if the operator allows it.
    AllowBacking {
        /// Directory of the file that the image names.
        dir: String,
    },
    /// Overwriting has to be asked for.
    Overwrite,
    /// The file is there: choose another name, or overwrite it.
    OtherNameOrOverwrite,
    /// Patches are missing between the image and this one.
    PatchesBetween,
    /// Finish the change that was cut short.
    FinishChange,
    /// The redo file belongs to the file that it names.
    PutBackAndFinish,
    /// The redo file needs room; writing in place does not.
    InPlaceNeedsNoRoom,
    /// The image was written to while it was read.
    ReadStill,
    /// Another program has the image open.
    InUse,
    /// A block device takes raw contents only.
    WriteRaw,
    /// Change the image in one of these ways.
    ChooseWay {
        /// The ways that are possible for this image.
        ways: Vec<Way>,
    },
    /// This user may not make files beside the image.
    MakeFiles,
    /// The list of changes does not say how large its blocks are.
    SayBlockSize,
    /// Name the file of the signature.
    NameSignature,
    /// Name the file of the identity that decrypts.
    NameIdentity,
    /// Name the file of the signing key's password.
    NameSignPassword,
    /// Decrypt in a pipe. `key_file`: with a file of keys; otherwise a passphrase is asked for.
    DecryptInPipe {
        /// Whether a file of keys decrypts it; otherwise a passphrase does.
        key_file: bool,
    },
}

/// How an image is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Durably noted first, then written.
    Redo,
    /// A copy takes the image's place.
    Copy,
    /// Written where it lies, without protection.
    InPlace,
    /// Whichever is possible.
    Auto,
}

/// A host, its agent, its daemon, its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Host {
    /// libvirt knows no such domain.
    FindDomain,
    /// libvirt runs on another host.
    RunOn {
        /// The host that libvirt runs on.
        host: String,
    },
    /// The state directory needs other rights, or another place.
    StateDir,
    /// A daemon has the state directory.
    AskDaemon,
    /// Look up what a policy consists of.
    PolicySchema,
    /// The target's agent serves no images.
    ServeImages,
    /// The target's agent brings no domains up.
    ServeFailovers,
    /// The target's agent serves another directory.
    ServedRoot,
}

impl Advice {
    /// Reads what a peer sent: `None` for one that this side does not know.
    pub(crate) fn known<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Advice>, D::Error> {
        let value = serde_json::Value::deserialize(input)?;
        Ok(serde_json::from_value(value).ok())
    }

    /// Plain words; `None` if a program has to choose them.
    pub fn text(&self) -> Option<&str> {
        match self {
            Advice::Text(text) => Some(text),
            _ => None,
        }
    }
}

macro_rules! into_advice {
    ($($family:ident),*) => {$(
        impl From<$family> for Advice {
            fn from(of: $family) -> Advice {
                Advice::$family(of)
            }
        }
    )*};
}

into_advice!(Run, Overlay, Repair, TakeOver, Store, Failover, Handover, Image, Host);

impl From<&'static str> for Advice {
    fn from(text: &'static str) -> Advice {
        Advice::Text(text.into())
    }
}

impl From<String> for Advice {
    fn from(text: String) -> Advice {
        Advice::Text(text.into())
    }
}
