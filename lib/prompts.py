"""Rows of prompts as people have them: .jsonl and .parquet files."""

from lib.files import UserError, count


def parquet_rows(path, columns, optional=(), group=None, at_once=4096):
    """Yields (row group, number in it, {column: cell}) for each row of a .parquet file or of one row group, with
    `at_once` of them in memory. Raises UserError if the file cannot be read or lacks one of the `columns`."""
    import pyarrow.parquet  # here, because few runs need it

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # no whole column at once
            names = file.schema_arrow.names
            for name in columns:
                if names.count(name) != 1:
                    raise UserError(f"{path} must have one column {name}; it has {', '.join(names)}.")
            wanted = [*columns, *[name for name in optional if name in names]]
            for g in range(file.num_row_groups) if group is None else [group]:
                batches = file.iter_batches(at_once, [g], wanted)
                for k, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                    yield g, k, {name: "" if cell is None else cell for name, cell in row.items()}
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read as a .parquet file: {str(error).splitlines()[0]}") from None


def check_rows(path, rows, fields):
    """Yields (number, id, text, ...), the `fields` of each (number, dict) in `rows`; the id of a row without an `id` is
    its number. Raises UserError at the end, with all bad rows named by file and number."""
    first_seen, bad = {}, []
    for number, row in rows:
        try:
            if isinstance(row, str):  # a line that is no JSON
                row.encode()
            texts, name = [row[field].strip() for field in fields], str(row.get("id", f"{number:06d}"))
            "".join(texts + [name]).encode()
        except UnicodeError:
            bad.append(f"{path}:{number}: not UTF-8: save the file as UTF-8")
        except (KeyError, TypeError, AttributeError):
            bad.append(f"{path}:{number}: not a row with texts {', '.join(fields)}: "
                       + str(row)[:80].encode(errors="replace").decode())
        else:
            if first_seen.setdefault(name, number) != number:
                bad.append(f"{path}:{number}: the id {name} is already that of line {first_seen[name]}")
            yield number, name, *texts
    stop_if_bad(path, bad)


def stop_if_bad(path, bad):
    """Raises UserError if there are bad lines, with the first of them."""
    if bad:
        raise UserError("\n".join([*bad[:20], f"{count(bad, 'bad line')} in {path} to be corrected or deleted. Nothing "
                                              "was written."]))
