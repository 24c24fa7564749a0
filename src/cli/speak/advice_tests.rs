//! Every advice is a sentence that a person understands, with commands that this program has; and the library names
//! none.

use super::*;
use clap::CommandFactory as _;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use virt_replica::name::{DiskName, DomainName, Generation, PointId};
use virt_replica::replica::upkeep::Promoted;
use virt_replica::replicate::plan::conflict::Conflict;
use virt_replica::replicate::settle::decide::HaltReason;

/// Words of one sentence, at most (english.md of the project says 25; this is the hard end).
const WORDS_MAX: usize = 35;

/// One of each, with the facts that change its words. That none is missing is a test of its own.
fn all() -> Vec<Advice> {
    let s = str::to_owned;
    let (domain, to, root) = (s("web 01"), s("ssh://dr1"), s("/srv/replicas"));
    let pair = || (domain.clone(), to.clone());
    let mut all: Vec<Advice> = Vec::new();
    {
        use Run::*;
        let of = [FirstPoint, NewPoint, ExcludeDisk, DefineDisk, InstallGuestAgent, WithoutGuestAgent];
        all.extend(of.map(Advice::Run));
    }
    {
        use Overlay::*;
        let of = [
            MakeRoom,
            NeedsDirectory,
            AnotherDirectory,
            AnotherFileSystem,
            LargerFileSystem,
            AllowMoreBytes,
            AllowMoreTime,
            GuestStopped,
        ];
        all.extend(of.map(Advice::Overlay));
    }
    {
        use Repair::*;
        let of = [
            Explain,
            ExplainLeftovers,
            StartSaved,
            EndBlockJob,
            CompareWithRecord,
            PlugIn,
            Start,
            OnOtherHost,
            ShutOff,
            ShutDown,
            CheckRights,
        ];
        all.extend(of.map(Advice::Repair));
    }
    {
        use TakeOver::*;
        all.extend([IfThisSideCounts, IfMovedHere, IfNoClone, IfStateWasLost].map(Advice::TakeOver));
    }
    {
        use Store::*;
        let of = [
            ListPoints { root: None },
            ListPoints { root: Some(root.clone()) },
            VerifyTarget,
            VerifyPoint,
            VerifyAndSendAnew,
            VerifyUnchanged,
            ScrubAnew,
            SetGeneration,
            SetGenerationHere,
            SetGenerationThere,
            UnpinThere,
            LowerMinAge,
            Prune,
            WritePointAnew,
            BringPointsBetween,
            Create { root: root.clone() },
            Lost { root },
            RightStore,
        ];
        all.extend(of.map(Advice::Store));
    }
    {
        use Failover::*;
        let of = [
            AskReady,
            AskElement,
            LeaveOffOrUndo,
            FinishFailback,
            Commit,
            FinishUndo,
            UndoOrHead,
            BeginAnew,
            DetachFirst,
            DetachAgain,
            DetachAfterLook,
            FinishDetach,
            DetachSameFormat,
            GiveWay,
            GiveWayByUuid,
            ShortenChain,
            UpdateTpmAndDrill,
            AlikeFirmwareAndDrill,
            Drill,
            OlderPoint,
            MapNetwork,
        ];
        all.extend(of.map(Advice::Failover));
    }
    {
        use Handover::*;
        all.extend([ResumeOrForceOff, WaitOrForceOff, BringHomeOrLose, Converge].map(Advice::Handover));
        let (domain, to) = pair();
        all.push(ShutOffHere { domain, to }.into());
        let (domain, to) = pair();
        all.push(LivesThere { domain, to }.into());
        let (domain, to) = pair();
        all.push(AskAgain { domain, to }.into());
        let (domain, to) = pair();
        all.push(AskAgainOrAbort { domain, to }.into());
        let (domain, to) = pair();
        all.push(Abort { domain, to }.into());
        let (domain, to) = pair();
        all.push(GoOnOrAbort { domain, to }.into());
    }
    {
        use Image::*;
        let of = [
            AllowBacking { dir: s("/srv/base images") },
            Overwrite,
            OtherNameOrOverwrite,
            PatchesBetween,
            FinishChange,
            PutBackAndFinish,
            InPlaceNeedsNoRoom,
            ReadStill,
            InUse,
            WriteRaw,
            ChooseWay { ways: vec![Way::Redo, Way::Copy, Way::Auto] },
            ChooseWay { ways: vec![Way::Redo, Way::InPlace] },
            MakeFiles,
            SayBlockSize,
            NameSignature,
            NameIdentity,
            NameSignPassword,
            DecryptInPipe { key_file: true },
            DecryptInPipe { key_file: false },
        ];
        all.extend(of.map(Advice::Image));
    }
    {
        use Host::*;
        let of = [
            FindDomain,
            RunOn { host: s("b") },
            StateDir,
            AskDaemon,
            PolicySchema,
            ServeImages,
            ServeFailovers,
            ServedRoot,
        ];
        all.extend(of.map(Advice::Host));
    }
    all
}

/// What serde knows below this family: it lists the names when it meets a strange one.
fn known(family: Option<&str>) -> BTreeSet<String> {
    let json = match family {
        Some(family) => serde_json::json!({ family: "no such name" }),
        None => serde_json::json!("no such name"),
    };
    let error = serde_json::from_value::<Advice>(json).unwrap_err().to_string();
    let (_, names) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn the_list_above_has_every_advice() {
    let mut seen: BTreeSet<(String, String)> = BTreeSet::new();
    for advice in all() {
        let json = serde_json::to_value(&advice).unwrap();
        assert_eq!(serde_json::from_value::<Advice>(json.clone()).unwrap(), advice, "it travels whole");
        let (family, of) = json.as_object().unwrap().iter().next().unwrap();
        let name = of.as_str().or_else(|| of.as_object()?.keys().next().map(String::as_str));
        seen.insert((family.clone(), name.unwrap().to_owned()));
    }
    let families = known(None);
    assert!(families.len() > 5, "{families:?}");
    for family in families {
        for name in known(Some(&family)) {
            assert!(seen.contains(&(family.clone(), name.clone())), "{family}: {name} is not in the list");
        }
    }
}

fn about() -> Context {
    Context { domain: Some("web01".into()), point: Some("000007-0123abcd".into()), ..Context::default() }
}

/// Sentences of a message: they end with a dot before a capital or a command, or with a semicolon.
fn sentences(text: &str) -> Vec<String> {
    let mut rest = text;
    let mut found = Vec::new();
    while let Some(at) = rest.find(". ").into_iter().chain(rest.find("; ")).min() {
        found.push(rest[..at].to_owned());
        rest = &rest[at + 2..];
    }
    found.push(rest.trim_end_matches('.').to_owned());
    found
}

/// What is wrong with the text of a message, whoever made it.
fn faults(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for sentence in sentences(text) {
        let words = sentence.split_whitespace().count();
        if words > WORDS_MAX {
            wrong.push(format!("{words} words: {sentence}"));
        }
    }
    let mut seen = BTreeSet::new();
    let repeated: Vec<String> =
        sentences(text).into_iter().filter(|s| s.split_whitespace().count() > 3 && !seen.insert(s.clone())).collect();
    wrong.extend(repeated.into_iter().map(|s| format!("said twice: {s}")));
    for mark in ["::", "{", "}", "Some(", "None)", "Err(", "Ok(", "  ", "\n"] {
        if text.contains(mark) {
            wrong.push(format!("'{mark}' in: {text}"));
        }
    }
    // Ten digits behind a point are nanoseconds.
    if text.as_bytes().windows(8).any(|w| w[0] == b'.' && w[1..].iter().all(u8::is_ascii_digit)) {
        wrong.push(format!("nanoseconds in: {text}"));
    }
    if text.is_empty() || text.ends_with([' ', ',', ';', ':', '-']) && !text.ends_with(" -") {
        wrong.push(format!("no proper end: {text}"));
    }
    wrong
}

#[test]
fn every_advice_is_plain_english() {
    for advice in all() {
        for about in [about(), Context::default()] {
            let said = words(&advice, &about);
            assert_eq!(faults(&said), [""; 0], "{advice:?}");
        }
    }
}

#[test]
fn the_check_of_messages_finds_what_it_looks_for() {
    let long = "word ".repeat(WORDS_MAX + 1);
    for bad in [
        long.as_str(),
        "it is Some(7)",
        "the kind is Kind::Busy",
        "run at 2026-12-01T03:31:27.123456789Z",
        "the target is away now; the target is away now",
        "it ends in the middle,",
        "",
    ] {
        assert_ne!(faults(bad), [""; 0], "{bad}");
    }
    assert_eq!(faults("look at it. Then run `virt-replica sync a --to b`"), [""; 0]);
}

/// The conflicts of a plan and the halts of a repair: what happened, and what to do.
#[test]
fn conflicts_and_halts_are_plain_english() {
    let disk = DiskName::new("vda").unwrap();
    let promoted = |committed| Promoted {
        point: PointId::new("000007-0123abcd").unwrap(),
        since: "2026-11-30T20:00:00.123456789Z".parse().unwrap(),
        committed,
    };
    let dir = PathBuf::from("/srv/o");
    let conflicts = [
        Conflict::BlockJob { disk: disk.clone() },
        Conflict::DomainJob { job: "a migration".into() },
        Conflict::DefinitionDiffers { disk: disk.clone(), live: "/srv/a".into(), defined: "/srv/b".into() },
        Conflict::StrayOverlay { disk: disk.clone(), overlay: "/srv/a.overlay".into() },
        Conflict::Unsettled { what: "a commit still runs".into() },
        Conflict::Promoted { ours: Generation(1), theirs: Generation(2) },
        Conflict::BroughtUp { promoted: promoted(false) },
        Conflict::BroughtUp { promoted: promoted(true) },
        Conflict::NoDisks,
        Conflict::SizeUnknown { disk: disk.clone() },
        Conflict::NoOverlaySpace {
            disk: disk.clone(),
            dir: dir.clone(),
            free_bytes: 1 << 30,
            growth_bytes: 2 << 30,
            floor_bytes: 1 << 30,
            hold_s: 60,
        },
        Conflict::NoOverlayDir { disk: disk.clone(), dir },
        Conflict::NoTargetSpace { free_bytes: 1 << 20, needed_bytes: 1 << 30 },
        Conflict::CannotQuiesce { why: "the guest has no agent".into() },
        Conflict::Unreadable { disk, why: "it is encrypted".into() },
    ];
    for conflict in conflicts {
        assert_eq!(faults(&conflict.to_string()), [""; 0], "{conflict:?}");
        assert_eq!(faults(&words(&conflict.advice(), &about())), [""; 0], "{conflict:?}");
    }
    use HaltReason::*;
    for reason in [
        ManagedSave,
        ForeignJob,
        ForeignChain,
        DiskGone,
        OverlayReplaced,
        OverlayLost,
        BaseTouched,
        StartedOnBase,
        OursBelowOff,
        MayRunElsewhere,
        CommitDenied,
        LibvirtLostTrack,
    ] {
        let (what, advice) = reason.explain();
        assert_eq!(faults(what), [""; 0], "{reason:?}");
        assert_eq!(faults(&words(&advice, &about())), [""; 0], "{reason:?}");
    }
}

/// The commands in backticks, with an example for each name in capitals.
fn commands(text: &str) -> Vec<Vec<String>> {
    let quoted = text.split('`').skip(1).step_by(2).filter(|part| part.starts_with("virt-replica "));
    let example = |word: &str| match word {
        "POINT" => "000007-0123abcd".to_owned(),
        "UUID" => "6695eb01-f6a4-8304-79aa-97f2502e193f".to_owned(),
        "GENERATION" => "2".to_owned(),
        "RULES" => "last=3".to_owned(),
        "ROOT" | "TARGET" | "HOME" => "local:/srv/replicas".to_owned(),
        word => word.to_owned(),
    };
    // No name of the list above has more than one blank, and that one stands between apostrophes.
    let words = |command: &str| command.replace("'web 01'", "web01").split(' ').map(example).collect();
    quoted.map(words).collect()
}

#[test]
fn every_command_that_is_advised_is_one_of_this_program() {
    let mut count = 0;
    for advice in all() {
        let said = words(&advice, &Context::default());
        for command in commands(&said) {
            let read = crate::cli::Cli::command().try_get_matches_from(&command);
            // `--help` is an error of its own kind, and no command here asks for it.
            assert!(read.is_ok(), "{said}\n{}", read.unwrap_err());
            count += 1;
        }
        for option in options(&said) {
            assert!(all_options().contains(&option), "{said}: this program has no {option}");
        }
    }
    // A build without libvirt has the same grammar.
    assert!(count > 40, "only {count} commands: looked in the wrong place");
}

#[test]
fn the_grammar_refuses_a_command_that_is_wrong() {
    for wrong in ["virt-replica sync web01", "virt-replica syncs web01 --to TARGET", "virt-replica doctor --repairs"] {
        let command = commands(&format!("`{wrong}`"));
        assert!(crate::cli::Cli::command().try_get_matches_from(&command[0]).is_err(), "{wrong}");
    }
}

/// Long options of ours in a text: not those in the command of another program, which stands between backticks.
fn options(text: &str) -> Vec<String> {
    let foreign =
        |part: &&str| ["virsh ", "age ", "minisign ", "fuser ", "--inactive"].iter().any(|p| part.starts_with(p));
    let ours: String = text.split('`').filter(|part| !foreign(part)).collect::<Vec<_>>().join(" ");
    let words = ours.split(|c: char| c.is_whitespace() || "(),.;:".contains(c));
    words.filter(|word| word.starts_with("--")).map(str::to_owned).collect()
}

/// Verbs and long options of this program, from its own grammar.
fn grammar() -> (BTreeSet<String>, BTreeSet<String>) {
    fn walk(command: &clap::Command, verbs: &mut BTreeSet<String>, options: &mut BTreeSet<String>) {
        options.extend(command.get_arguments().filter_map(|arg| Some(format!("--{}", arg.get_long()?))));
        for below in command.get_subcommands() {
            verbs.insert(below.get_name().to_owned());
            walk(below, verbs, options);
        }
    }
    let (mut verbs, mut options) = (BTreeSet::new(), BTreeSet::new());
    walk(&crate::cli::Cli::command(), &mut verbs, &mut options);
    (verbs, options)
}

fn all_options() -> BTreeSet<String> {
    grammar().1
}

/// Sentences of the library that name a command all the same, and why. An entry that is needed no more is an error.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("src/hypervisor/travel.rs", "virsh attach-disk --config", "--config is virsh's"),
    ("src/replica/root.rs", "virt-replica store", "the name of a format"),
    ("src/replica/damage.rs", "virt-replica scrub", "the name of a format"),
    ("src/policy/keys.rs", "virt-replica policy", "the title of a schema"),
    ("src/recovery/ready.rs", "virsh net-list --all", "--all is virsh's"),
];

/// String literals of a source, without tests and comments: (line, text).
fn literals(source: &str) -> Vec<(usize, String)> {
    let end = source.find("\n#[cfg(test)]\nmod ").unwrap_or(source.len());
    let text: Vec<char> = source[..end].chars().collect();
    let (mut at, mut line, mut found) = (0, 1, Vec::new());
    let starts = |at: usize, with: &str| with.chars().enumerate().all(|(n, c)| text.get(at + n) == Some(&c));
    while at < text.len() {
        if starts(at, "//") {
            while at < text.len() && text[at] != '\n' {
                at += 1;
            }
        } else if starts(at, "'\"'") || starts(at, "'\\\"'") || starts(at, "b'\"'") {
            at += if text[at + 1] == '\\' { 4 } else { 3 };
        } else if text[at] == '"' {
            let begun = line;
            let mut literal = String::new();
            at += 1;
            while at < text.len() && text[at] != '"' {
                if text[at] == '\\' {
                    at += 1;
                    if text.get(at) == Some(&'\n') {
                        line += 1;
                        while text.get(at + 1).is_some_and(|c| c.is_whitespace()) {
                            at += 1;
                            line += usize::from(text[at] == '\n');
                        }
                    } else {
                        literal.extend(text.get(at));
                    }
                } else {
                    line += usize::from(text[at] == '\n');
                    literal.push(text[at]);
                }
                at += 1;
            }
            at += 1;
            found.push((begun, literal));
        } else {
            line += usize::from(text[at] == '\n');
            at += 1;
        }
    }
    found
}

/// The command of ours that a sentence names, if it names one. One word alone is no sentence, but an argument.
fn named<'a>(text: &'a str, verbs: &BTreeSet<String>, options: &BTreeSet<String>) -> Option<&'a str> {
    if !text.trim().contains(' ') {
        return None;
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
    let word_at = |at: usize| text[at..].split(|c| !is_word(c)).next().unwrap_or_default();
    for (at, _) in text.match_indices("virt-replica ") {
        let verb = word_at(at + "virt-replica ".len());
        if verbs.contains(verb) {
            return Some(&text[at..at + "virt-replica ".len() + verb.len()]);
        }
    }
    for (at, _) in text.match_indices("--") {
        let before = text[..at].chars().next_back();
        if options.contains(word_at(at)) && !before.is_some_and(is_word) {
            return Some(word_at(at));
        }
    }
    // A verb that leads a quoted command: `sync DOMAIN`.
    for (at, _) in text.match_indices('`') {
        let verb = word_at(at + 1);
        if verbs.contains(verb) && text[at + 1 + verb.len()..].starts_with(" ") {
            return Some(verb);
        }
    }
    text.contains("-c URI").then_some("-c")
}

#[test]
fn the_library_names_no_command_of_this_program() {
    let (verbs, options) = grammar();
    assert!(verbs.contains("sync") && options.contains("--take-over"), "{verbs:?} {options:?}");
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut files = 0;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "src/cli" {
                dirs.push(path);
            } else if name.ends_with(".rs") && stem != "main" && stem != "tests" && !stem.ends_with("_tests") {
                files += 1;
                for (line, text) in literals(&std::fs::read_to_string(&path).unwrap()) {
                    let Some(command) = named(&text, &verbs, &options) else { continue };
                    match ALLOWED.iter().position(|(file, part, _)| *file == name && text.contains(part)) {
                        Some(at) => drop(used.insert(at)),
                        None => wrong.push(format!("{name}:{line}: `{command}` in: {text}")),
                    }
                }
            }
        }
    }
    assert!(files > 200, "found only {files} sources: looked in the wrong place");
    assert!(
        wrong.is_empty(),
        "an advice is data; its words belong into src/cli/speak/advice.rs:\n{}",
        wrong.join("\n")
    );
    for (at, (file, part, _)) in ALLOWED.iter().enumerate() {
        assert!(used.contains(&at), "{file}: nothing says '{part}' any more: take it off the list");
    }
}

#[test]
fn the_search_for_commands_finds_them() {
    let (verbs, options) = grammar();
    for bad in [
        "run `virt-replica doctor` for more",
        "give it longer (--timeout)",
        "as `drill --probe` has it",
        "look with -c URI again",
    ] {
        assert!(named(bad, &verbs, &options).is_some(), "{bad}");
    }
    for good in ["use the version of virt-replica that wrote it", "--images", "`verify`, `scrub`"] {
        assert_eq!(named(good, &verbs, &options), None, "{good}");
    }
    let source = "// \"virt-replica sync\"\nlet a = \"one \\\n   two\"; let b = '\"'; f(\"three\");\n\n#[cfg(test)]\nmod tests { \"four\" }";
    let found: Vec<_> = literals(source).into_iter().map(|(line, text)| format!("{line} {text}")).collect();
    assert_eq!(found, ["2 one two", "3 three"]);
}

#[test]
fn names_are_filled_in_and_quoted() {
    let said = |advice: Advice| words(&advice, &about());
    assert_eq!(said(Run::FirstPoint.into()), "`virt-replica sync web01 --to TARGET` makes the first point");
    let there = Store::UnpinThere.into();
    assert!(said(there).contains("unpin web01 000007-0123abcd --to ROOT"));
    let abort = Handover::Abort { domain: "it's".into(), to: "ssh://b/a;rm".into() };
    let wanted = r"`virt-replica failover 'it'\''s' --to 'ssh://b/a;rm' --abort` goes on with that";
    assert_eq!(said(abort.into()), wanted);
    let free = Advice::from("free space there");
    assert_eq!(said(free), "free space there");
    let name = DomainName::new("web01").unwrap();
    let error = Error::new(virt_replica::error::Kind::Conflict, "no").domain(&name).advise(Repair::Explain);
    assert_eq!(of(&error).unwrap(), "`virt-replica doctor web01` says what was found and what to do");
}
