"""Floor 5, results for machines and for people.

- `result`: `result.json`, the tidy rows of every figure measured
- `page`: building blocks of one self-contained HTML page
- `plots`: figures as inline SVG that follow the page's colours
- `extraction`: what was extracted from a model, as page, terminal summary, rows and files
- `extraction_data`, `verdict`: what that report is made from, and what may be concluded
- `training`: how a fine-tuning went
"""
