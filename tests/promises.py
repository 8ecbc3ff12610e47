"""The tests of each promise that the README makes: sentence → test ids, below tests/.

Whoever changes a sentence of the README's first paragraph or of its "Promises" changes it here, and looks at its tests.
Other sentences stand anywhere in the README.
"""

from __future__ import annotations

PROMISES: dict[str, tuple[str, ...]] = {
    "Tensors are streamed, so memory does not grow with the model (57 MB for 3 GB as for 10 GB), and a round trip "
    "restores every file, bit for bit.": (
        "convert/test_memory.py::test_a_model_of_several_times_the_budget_takes_no_more_memory",
        "convert/test_golden.py::test_hf_comes_back_file_for_file",
        "convert/test_golden.py::test_meta_comes_back_file_for_file",
        "convert/test_golden.py::test_native_comes_back_file_for_file",
        "convert/test_sidefiles.py::test_everything_comes_back_byte_for_byte",
    ),
    "In a training loop, its `Checkpointer` saves each step in the format that the run started from, and resumes "
    "exactly.": (
        "checkpointer/test_checkpointer_identity.py::test_huggingface_safetensors",
        "checkpointer/test_checkpointer_identity.py::test_meta_tensor_parallel",
        "checkpointer/test_checkpointer_resume.py::test_from_a_bfloat16_source",
        "reliability/test_restarts.py::test_a_run_that_is_killed_after_each_call_ends_with_the_same_files",
    ),
    "Under `torchrun` the same lines do the same: with DDP, FSDP2 or tensor parallelism each rank reads and writes its "
    "own slices, nothing is gathered, and any number of ranks resumes.": (
        "checkpointer/test_distributed_loading.py::test_each_process_has_its_slices",
        "checkpointer/test_distributed_matrix.py::test_the_files_are_those_of_one_process",
        "checkpointer/test_distributed_saving.py::test_resumed_by_other_worlds",
    ),
    "Nothing is cast unless `--dtype` or `--dequantize` asks for it; NaN payloads, integers, bool and fp8 survive.": (
        "convert/test_layouts.py::test_every_dtype_and_bit_pattern_survives",
        "convert/test_layouts.py::test_casts_are_torchs",
        "convert/test_golden.py::test_hf_to_meta",
        "checkpoint/test_quantized_carried.py::test_it_is_carried_file_for_file",
    ),
    "A cast that makes finite values infinite is refused (`--allow-overflow`).": (
        "reliability/test_casts.py::test_a_cast_that_makes_values_infinite_is_refused_with_names_and_counts",
        "reliability/test_casts.py::test_values_that_fit_and_those_that_were_infinite_already_pass",
    ),
    "Every key is accounted for before a tensor is read.": (
        "convert/test_bad_input.py::test_missing_and_unexpected_keys_are_all_listed",
        "convert/test_layouts.py::test_a_plan_reads_no_tensor_and_writes_nothing",
    ),
    "What the target has no place for is kept in the record and reported; what cannot be kept is an error that names "
    "it.": (
        "convert/test_layouts.py::test_tables_that_the_config_determines_are_carried",
        "convert/test_bad_input.py::test_biases_have_no_place_in_meta_and_native",
        "reliability/test_what_has_no_place.py::test_a_trained_bias_that_hf_has_no_place_for_is_refused",
    ),
    "Converted back to its original format, a checkpoint has the same file names, the same key in the same file, the "
    "same headers, config and tokenizer: unchanged weights give files with the same sha256.": (
        "convert/test_golden.py::test_hf_comes_back_file_for_file",
        "convert/test_layouts.py::test_changed_weights_keep_the_layout",
        "convert/test_layouts.py::test_bin_comes_back_file_for_file",
        "checkpoint/test_unknown_family.py::test_unchanged_weights_give_the_same_files",
    ),
    "The output appears under its name complete, flushed to disk, or not at all.": (
        "convert/test_faults.py::test_everything_is_flushed_before_the_name_appears",
        "convert/test_faults.py::test_enospc_in_the_middle",
        "reliability/test_publishing.py::test_an_overwrite_that_is_stopped_anywhere_leaves_one_of_both",
    ),
    "An interruption leaves a `.DST.partial` that nothing accepts and that `--resume` continues.": (
        "convert/test_faults.py::test_kill_then_resume_then_a_plain_run",
        "convert/test_faults.py::test_what_a_killed_run_left_is_accepted_by_nothing",
        "convert/test_faults.py::test_resume_on_the_command_line",
    ),
    "`--overwrite` replaces checkpoints only: a directory with anything else in it is refused.": (
        "reliability/test_replacing.py::test_overwriting_refuses_what_it_would_lose_and_names_it",
        "reliability/test_replacing.py::test_checkpoints_of_all_kinds_are_replaced_without_a_word",
    ),
    "The folder `ckpt_convert/` in each output holds a manifest with checksums, and what an exact round trip needs.": (
        "reliability/test_record.py::test_a_flipped_bit_in_any_file_is_found",
        "reliability/test_record.py::test_whatever_is_edited_renamed_or_removed_in_the_manifest_is_noticed",
        "convert/test_sidefiles.py::test_everything_comes_back_byte_for_byte",
    ),
    "In a bucket the manifest comes last, and nothing accepts what is there before it.": (
        "convert/test_stores.py::test_whatever_request_fails_nothing_half_written_is_accepted",
        "reliability/test_store_faults.py::test_an_attempt_ends_and_the_next_goes_on",
        "reliability/test_store_faults.py::test_whatever_request_fails",
        "reliability/test_store_kills.py::test_the_next_attempt_is_as_the_only_one",
    ),
    "A checkpoint without it works, too.": (
        "reliability/test_record.py::test_without_an_edited_manifest_the_weights_can_be_converted_as_the_message_says",
        "convert/test_golden.py::test_meta_to_hf",
    ),
    "Unknown families, differing tied weights, a RoPE scaling that the target's config cannot express: a clear error "
    "with the way out.": (
        "convert/test_bad_input.py::test_unknown_model_type",
        "convert/test_bad_input.py::test_tied_weights_that_differ_are_refused_towards_meta_too",
        "convert/test_bad_input.py::test_a_rope_scaling_that_meta_cannot_say",
    ),
    "Where no file holds a fact (Llama 3.1's rope factor), a documented rule and a notice.": (
        "models/llama/test_config.py::test_the_rope_factor_is_always_noticed",
        "models/llama/test_config.py::test_the_positions_of_an_unknown_shape_follow_the_documented_rule",
    ),
    "No pickle runs code, no name or link leaves the directory, no size is used unchecked.": (
        "convert/test_bad_input.py::test_a_malicious_pickle_runs_nothing",
        "containers/test_torchpickle.py::test_what_is_not_on_the_list_is_named_and_never_run",
        "reliability/test_untrusted_names.py::test_each_file_of_a_checkpoint",
        "reliability/test_untrusted_names.py::test_the_files_that_a_manifest_names",
        "convert/test_bad_input.py::test_sizes_are_not_believed",
        "reliability/test_linear.py::test_what_no_call_shows",
    ),
    "`--dry-run` shows the whole plan and writes nothing:": (
        "convert/test_layouts.py::test_a_plan_reads_no_tensor_and_writes_nothing",
        "cli/test_plan.py::test_one_line_for_each_group_where_there_is_no_terminal",
    ),
    "All of them print one JSON document with `--json` ([docs/json.md]), and their exit code says whether they "
    "found a problem or a difference.": (
        "cli/test_schemas.py::test_inspect_of_every_form",
        "cli/test_schemas.py::test_reports",
        "reliability/test_verdicts.py::test_verify",
        "reliability/test_verdicts.py::test_diff",
    ),
    "All directions between a family's formats work, and each format to itself.": (
        "convert/test_golden.py::test_hf_to_native",
        "convert/test_golden.py::test_native_to_meta",
        "convert/test_experts.py::test_there_and_back",
        "convert/test_torchtitan.py::test_from_meta_and_back",
    ),
}
