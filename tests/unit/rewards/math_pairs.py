r"""Pairs of a dataset's answer and a boxed one, written by hand: `right(gold, said)` or `wrong`."""

# ruff: noqa: RUF001 - dashes and signs as models write them
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
71/6 | 11 5/6
5\text{ cm} | 5 cm
5\text{ cm} | 5cm
5\text{ m} | 5 m
1011_2 | 1011_2
1011_{2} | 1011_2
1011_2 | 11
1A_{16} | 1A_{16}
-5 | –5
-5 | —5
73 | **73**
73 | *73*
73 | 73.
9 | 3²
5/2 | 2½
1/2 | ½
\pi r^2 h | \pi r^2 h
2/3 | 0.\overline{6}
0.1\overline{6} | \frac{1}{6}
0.\overline{142857} | 1/7
0.\bar{3} | 1/3
10000 | 10\,000
10000 | 10 000
10000 | 10\ 000
10000 | 10~000
7 | (7)
\pm 7 | \pm 7
1,2 | 2,1
1, 2 | \{1,2\}
(1,2),(3,4) | (3,4),(1,2)
5! | 120
5 | 5_{10}
5 | |5|
5 | -(-5)
A,B | B,A
y=2x | 2x
2x | y=2x
x=1,y=2 | y=2,x=1
\emptyset | \{\}
5:6 | 5/6
3\frac{1}{2} | 3.5
-3\frac{1}{2} | -3.5
-3 1/2 | -7/2
1.000 | 1
x \in (1,2) | (1,2)
1 < x < 2 | (1,2)
1 < x | x > 1
0.5 | 50\%
5\text{ mg} | 5 mg
5\text{ km/h} | 5 km/h
5\text{ km/h} | 5\text{ kilometers per hour}
5\text{ mph} | 5\text{ miles per hour}
\$5 | 5 dollars
5\text{ million} | 5,000,000
5\text{ million dollars} | \$5,000,000
20\text{ cm}^2 | 20 cm^2
20\text{ square feet} | 20 square feet
\frac{1}{2}\text{ m} | \frac{1}{2} m
\pi r^2 h | \pi r^2 h\text{ cm}
2\pi r | 2 r \pi
19, 46, \text{ and } 82 | 82, 46, 19
1-\frac{1}{\mathrm{e}} | 1-\frac{1}{e}
12:00 | 12:00
2x+4y-3=0 | y=-\frac{1}{2}x+\frac{3}{4}
\frac{1}{3} | 0.\overline{3}
\frac{1}{3} | 0.33\overline{3}
-\frac{1}{3} | -0.\overline{3}
1.\overline{9} | 2
12_8 | 10
2A_{16} | 42
1011_{2} | (1011)_2
1011_2 | 1011_{two}
1011_{\text{two}} | 11
1011_{\text{base }2} | 1011_{2}
11 5/6 | \frac{71}{6}
11\frac{5}{6} | 11 5/6
5 | 2 + 3
1000 | 1\,000
1000000 | 1\,000\,000
1000 | 1 000
1000.5 | 1\,000.5
x^2 | x²
x^{10} | x¹⁰
\sqrt{2} | √2
2\sqrt{3} | 2√3
\pi | π
3 \times 4 | 12
6 | 3·2
1/3 | ⅓
x_1 | x₁
73 | \textbf{73}
73 | \mathbf{73}
73 | \(73\)
73 | $73$
6 | 2*3
\{1,2\} | \lbrace 1,2 \rbrace
3\% | 0.03
\text{Monday} | monday
x=1 \text{ or } x=2 | x=2, x=1
90\text{ two-digit numbers} | 90
7\text{ m3} | 7\text{ m3}
7 | 7\text{ m2}
5000\text{ dollars} | 5\text{ thousand dollars}
10 | \frac{20}{2} = 10 = 10
x=y=7 | x=y=7
x^2+C | x^2+c
C | c
A,B | b,a
\begin{pmatrix}\frac12\\2\end{pmatrix} | \begin{pmatrix}0.5\\2\end{pmatrix}
2x+3 | 2x + 3
5 | x = 5
5 | n = 5 \text{ km}
10 | \frac{20}{2} = 10
10 | x = 2 \cdot 5 = 10
\pi(R^2-r^2) | \pi (R-r)(R+r)
300 | 300\text{ K}
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
(1,2) | \{1,2\}
\{1,2\} | (1,2)
0.0000001 | 0.0000002
0 | 0.0000002
1/2^99 | 1/2^98
5\text{ cm} | 5 m
5\text{ cm} | 5\,\mathrm{m}
5 cm | 5 m
12\text{ hours} | 12 minutes
1011_2 | 1011_3
1011_{two} | 1011_{three}
5_{max} | 5_{min}
1011_2 | 1011_{\text{three}}
1011_{\text{base }2} | 1011_{\text{base }3}
1011_2 | 1010_2
1011_2 | 1011
1011 | 1011_2
1A_{16} | 1B_{16}
5 | –5
3 | 3²
2 | 2½
\pi r^2 h | \pi r^2
\pi r^2 | \pi r^2 h
2 | 2t
2t | 2
3x | 3
3 | 3x
2 | 2 m
2 | 2s
2m | 2
10gh | 10g
mg | m
mgh | mg
vt | v
0.\overline{6} | 0.\overline{7}
0.3 | 0.\overline{3}
0.6 | 0.\overline{6}
0.333 | 0.333...
1/3 | 0.333\ldots
5 | 2 3
23 | 2 3
6 | 2 3
6 | 2\ 3
5 | 2\;3
10000 | 10\,00
7 | 7 \text{ or } 8
7 | 7; 8
7 | 7 and 8
7 | 7 \text{ and } 8
7 | 7 \vee 8
7 | 8 = 7
7 | x=7, x=8
7 | 8, 7
7 | \{7\}
7 | [7]
7 | \pm 7
\pm 7 | 7
7 | \approx 7
7 | \neq 7
7 | > 7
7 | x > 7
7 | x \ge 7
7 | x \neq 7
x>7 | x<7
(1,2) | [1,2]
1,2 | 1,2,3
1,2,3 | 1,2
(1,2),(3,4) | (1,2)
1e-7 | 2e-7
0.1234567 | 0.1234568
1000000.1 | 1000000.2
123456789012345678 | 123456789012345679
10^{30} | 10^{30}+1
\sqrt{2} | 1.41421356
\sqrt{2} | 1.414213562373095
\pi | 3.14159265
\pi | 3.141592653589793
\frac{1}{3} | 0.333333
\frac{1}{3} | 0.3333333333333333
\frac{2}{3} | 0.666667
5 | 5!
5 | 5'
-5 | |5|
5 | \text{not } 5
5 | not 5
5 | five
5 | 5\text{ thousand}
5 | 5 thousand
5 | 5\text{ million}
5 | 5k
5 | 5\text{ dozen}
5 | 5\text{ or }6
5 | 5i
5 | 5e
5 | 5\pi
\text{A} | \text{B}
\text{Yes} | \text{No}
\text{north} | \text{north-east}
A,B | A
x^2 | x^3
x | y
a+b | a-b
f(x)=x | f(x)=x^2
2x | 2x=0
x=1 | y=1
x=1,y=2 | x=2,y=1
\frac{1}{0} | \frac{2}{0}
\infty | -\infty
\infty | 10^{99}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | (1,2)
5:6 | 6:5
12:30 | 12
12 | 12:30
3 \frac{1}{2} | \frac{3}{2}
-3\frac{1}{2} | -2.5
3 1/2 | 31/2
31/2 | 3 1/2
1,000 | 1
1 | 1,000
1,5 | 1.5
x_1 | x_2
a_n | a_m
\log_2 3 | \log_3 2
\log_{2} 3 | \log_{10} 3
\sin x | \cos x
\sqrt{x} | \sqrt[3]{x}
\binom{5}{2} | \frac{5}{2}
(1,2] | (1,2)
1 < x < 2 | 1 < x < 3
2 | 2mg
2mg | 2
2ms | 2
5\text{ mg} | 5 kg
5\text{ kg} | 5 g
5\text{ km/h} | 5\text{ m/s}
\$5 | 5\text{ euros}
\$5 | 5 cents
5\text{ million} | 5
20\text{ cm}^2 | 20\text{ cm}^3
20\text{ cm}^2 | 20 cm
2\pi r | 2\pi
\frac{1}{2004!} | \frac{1}{2006!}
x/2^{99} | x/2^{98}
10^{-20} | 10^{-21}
10^{-20} | 0
x+10^{-20} | x
n=2,3,4 | n=1,2,3
D=(0,1) | D=(0,1.5)
19, 46, \text{ and } 82 | 21, 36, and 82
\frac{2^{2005}+1}{3\cdot 2^{2006}} | \frac{1}{3\cdot 2^{2006}}
1-\frac{1}{\mathrm{e}} | 1+\frac{1}{\mathrm{e}}
12:00 | 1:00
1,2,\ldots,n | 1,3,5,\ldots,2n-1
4 | 4\sqrt(2)
3x-y+13=0 | 3x+4y+14=0
f(x)=0 | \forall x>0, f(x)=0
0.\overline{12} | 0.\overline{21}
0.1\overline{2} | 0.\overline{12}
A_1 | A_2
x_{10} | x_{11}
12_{8} | 12_{9}
77_{8} | 88_{8}
1011_2 | 1101_2
-11 5/6 | 71/6
11 5/6 | 11 \cdot 5/6
55/6 | 11 5/6
16 | 11 5
115 | 11 5
5 | 2\,3
1 | 1 000
3 | 3^{2}
\sqrt{2} | √3
2 | √2
3\pi | 3
3 | 3×4
3 | ⅓
73 | **74**
(1,2) | \langle 1,2 \rangle
\{1,2\} | [1,2]
[1,2] | (1,2)
\{(1,2)\} | (1,2)
(1,2) | \{2,1\}
\{1,2\} | (2,1)
\left\{1,2\right\} | \left(1,2\right)
(1,2) | (1,2.0000001)
\{1,2\} | \{1,2.0000001\}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2.0000001\end{pmatrix}
[0,1] | [0,1.0000001]
x=0.0000001 | x=0.0000002
x > 0.0000001 | x > 0.0000002
y=2^{-99}x | y=2^{-98}x
\{2^{-99}\} | \{2^{-98}\}
(2^{-99},1) | (2^{-98},1)
5 | 5 6
7 | 7 8/9
\text{two} | 2
\text{No} | \text{None}
\text{neither} | \text{either}
x=1 \text{ or } x=2 | x=1
10 | \frac{20}{3} = 10
10 | 5 = 2 \cdot 5 = 10
10 | x = 2 \cdot 6 = 10
\pi(R^2-r^2) | 0
\frac{S}{s} | 1
5 | 5 \mod 6
5 | 5\text{ tenths}
5 | 5\text{ squared}
5 | 5\text{ or more}
5 | 5\text{k}
5 | 5\mathrm{x}
7 | 7\text{8}
7 | 7\text{-8}
7 | 7\text{ cm 8}
7 | 7\text{ eight}
7 | 7\text{ maybe eight}
7 | 7\text{ cm or less}
7 | 7\text{ choose 2}
7 | 7\text{ quadrillion}
7 | 7\text{ pi}
7 | 7\text{ twice}
7 | 7=8=7
7 | x=7, y=8=7
x=7 | x=8=7
\pi r^2 | \pi R^2
R+1 | r+1
\sigma^2 | \Sigma^2
\begin{pmatrix}0.0000001\\2\end{pmatrix} | \begin{pmatrix}0.0000002\\2\end{pmatrix}
\begin{pmatrix}\frac13\\2\end{pmatrix} | \begin{pmatrix}0.333333333\\2\end{pmatrix}
12 | 12_0
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
