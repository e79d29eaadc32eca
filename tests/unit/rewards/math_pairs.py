r"""Pairs of a dataset's answer and a boxed one, written by hand: `right(gold, said)` or `wrong`."""

from __future__ import annotations

RIGHT = r"""
5 | 5
5 | 5.0
-3 | -3
0 | 0
1000 | 1,000
1000 | 1000
1{,}234 | 1234
12345 | 12{,}345
0.5 | .5
0.5 | \frac{1}{2}
\frac{1}{2} | 0.5
\frac{1}{2} | 1/2
\frac12 | \frac{1}{2}
\dfrac{3}{4} | \frac{3}{4}
\tfrac{3}{4} | 0.75
\frac{3}{4} | \frac{6}{8}
-\frac{2}{3} | \frac{-2}{3}
-\frac{2}{3} | \frac{2}{-3}
\frac{10}{4} | 2.5
\frac{7}{2} | 3.5
1.25 | \frac{5}{4}
\frac{1}{3} | \frac{2}{6}
\frac{22}{7} | 22/7
2\frac{1}{2} | \frac{5}{2}
\sqrt{2} | \sqrt{2}
\sqrt{8} | 2\sqrt{2}
2\sqrt{2} | \sqrt{8}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
\sqrt{12} | 2\sqrt3
\sqrt{\frac{1}{4}} | \frac{1}{2}
\sqrt[3]{8} | 2
3\sqrt{5}+1 | 1+3\sqrt{5}
\pi | \pi
2\pi | \pi \cdot 2
\frac{\pi}{4} | \frac{1}{4}\pi
\frac{\pi}{2} | \pi/2
4\pi^2 | (2\pi)^2
e^2 | e^{2}
2^{10} | 1024
10^3 | 1000
3 \cdot 4 | 12
3 \times 10^4 | 30000
1.5 \times 10^{-3} | 0.0015
x+1 | 1+x
x^2+2x+1 | (x+1)^2
x^2-1 | (x-1)(x+1)
2(x+y) | 2x+2y
\frac{x}{2} | 0.5x
\frac{x+1}{2} | \frac{1}{2}x+\frac{1}{2}
ab | ba
a^2b | b a^2
x | x
3x-2 | -2+3x
\frac{1}{x} | x^{-1}
x=3 | 3
3 | x=3
x = 3 | x=3
y=2x+1 | y=2x+1
y=2x+1 | y = 1+2x
(1,2) | (1,2)
(1, 2) | (1,2)
(1,2) | (1.0,2.0)
(\frac{1}{2},3) | (0.5,3)
(-1,0) | (-1, 0)
(1,2,3) | (1,2,3)
\left(1,2\right) | (1,2)
\left(\frac{1}{2}, 1\right) | (\frac12, 1)
[0,1) | [0,1)
[0,1] | [0, 1]
(0,\infty) | (0,\infty)
(-\infty,3] | (-\infty, 3]
(-\infty, 1) \cup (2, \infty) | (-\infty,1)\cup(2,\infty)
[1,2] \cup [3,4] | [1,2]\cup[3,4]
\left[0, \frac{1}{2}\right] | [0,0.5]
\{1,2\} | \{1,2\}
\{1,2\} | \{2,1\}
\{1,2,3\} | \{3,1,2\}
\{\frac12, 1\} | \{0.5, 1\}
5\text{ cm} | 5
5\text{ cm} | 5\text{ cm}
5 \text{ cm} | 5\text{cm}
5\text{ cm} | 5\text{ centimeters}
12\text{ meters} | 12\text{ m}
3\text{ hours} | 3
20\text{ square feet} | 20\text{ ft}^2
20\mathrm{\ cm^2} | 20
90^\circ | 90
90^\circ | 90^{\circ}
45^\circ | 45
50\% | 50\%
50\% | 0.5
50 | 50\%
\$5 | 5
\$12.50 | 12.5
7\text{ apples} | 7
\text{7} | 7
\boxed{7} | 7
#### 42 | 42
So the answer is \boxed{\frac{1}{4}}. | 0.25
\text{Monday} | \text{Monday}
\text{even} | \text{even}
A | A
\text{(B)} | \text{(B)}
100! | 100!
\frac{5!}{3!} | 20
\binom{5}{2} | 10
|-3| | 3
\log_2 8 | 3
\ln e | 1
\cos 0 | 1
i | i
1+i | i+1
3-2i | -2i+3
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
x \le 3 | x \le 3
x > 2 | x>2
"""

WRONG = r"""
5 | 6
5 | -5
5 | 50
5 | 0.5
-3 | 3
0 | 1
1000 | 1,00
1000 | 10000
12345 | 12354
0.5 | 0.05
0.5 | 0.51
\frac{1}{2} | \frac{2}{1}
\frac{1}{2} | \frac{1}{3}
\frac{1}{2} | -\frac{1}{2}
\frac{1}{2} | 1.2
\frac12 | 12
\frac{3}{4} | \frac{4}{3}
\frac{2}{3} | 0.67
\frac{1}{3} | 0.3
\frac{1}{3} | 0.33
\frac{10}{4} | 10.4
2\frac{1}{2} | \frac{1}{2}
2\frac{1}{2} | 1
\sqrt{2} | 2
\sqrt{2} | \sqrt{3}
\sqrt{2} | 1.4
\sqrt{8} | 4
2\sqrt{2} | 2\sqrt{3}
2\sqrt{2} | \sqrt{2}
\frac{1}{\sqrt{2}} | \sqrt{2}
\sqrt[3]{8} | \sqrt{8}
\pi | 3.14
\pi | 3
2\pi | \pi
\frac{\pi}{4} | \frac{4}{\pi}
4\pi^2 | 2\pi^2
e^2 | 2e
2^{10} | 20
10^3 | 30
3 \times 10^4 | 3 \times 10^5
x+1 | x-1
x+1 | x
x^2+2x+1 | x^2+1
x^2+2x+1 | (x-1)^2
x^2-1 | (x-1)^2
2(x+y) | 2x+y
\frac{x}{2} | \frac{2}{x}
a^2b | ab^2
3x-2 | 2-3x
\frac{1}{x} | x
x=3 | x=-3
x=3 | 4
y=2x+1 | y=2x-1
(1,2) | (2,1)
(1,2) | (1,3)
(1,2) | 1
(1,2,3) | (1,2)
(1,2,3) | (1,3,2)
[0,1) | (0,1)
[0,1) | [0,1]
[0,1] | [0,2]
(0,\infty) | [0,\infty)
(0,\infty) | (0,1)
(-\infty,3] | (-\infty,3)
(-\infty, 1) \cup (2, \infty) | (-\infty,1)
[1,2] \cup [3,4] | [1,2]\cup[3,5]
\{1,2\} | \{1\}
\{1,2\} | \{1,3\}
\{1,2\} | \{1,2,3\}
5\text{ cm} | 6\text{ cm}
5\text{ cm} | 5\text{ m}
5\text{ cm} | 5\text{ cm}^2
12\text{ hours} | 12\text{ minutes}
90^\circ | 60^\circ
50\% | 5\%
50\% | 5
\$5 | \$50
\$12.50 | 1250
\boxed{7} | 8
#### 42 | 24
\text{Monday} | \text{Tuesday}
\text{even} | \text{odd}
A | B
100! | 99!
\binom{5}{2} | \binom{5}{3} + 1
|-3| | -3
\log_2 8 | 4
\sin 30^\circ | \frac{\sqrt{3}}{2}
1+i | 1-i
i | -i
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
x \le 3 | x < 3
x \le 3 | x \ge 3
x > 2 | x > 3
7 | 7, 8
7 | 7 or 8
5 | \text{five hundred}
12 | 1 2 3
"""

# What math-verify does not see; known, so that nobody counts on it.
MISSED = r"""
\sin 30^\circ | \frac{1}{2}
i^2 | -1
"""


def _pairs(text: str) -> list[tuple[str, str]]:
    rows = [line.rsplit(" | ", 1) for line in text.strip().splitlines()]
    return [(gold.strip(), said.strip()) for gold, said in rows]


MISSED_PAIRS = _pairs(MISSED)
PAIRS = [(g, s, 1.0) for g, s in _pairs(RIGHT)] + [(g, s, 0.0) for g, s in _pairs(WRONG)]
