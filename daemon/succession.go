package daemon

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/internal/wait"
)

// seatName is an abstract Unix socket, of which there is one in a network
// namespace, as of the kernel's tables. It goes when its process does, however
// that ends, and needs no file that two containers would have to share.
const seatName = "@signalbox-serves-this-node"

// seat is the place of the one signalbox that serves a network namespace. Who
// comes later takes it, once it serves: in an update with a surge the old
// process still runs then, and two that write the same tables would each undo
// what the other did. The old one stands by, and serves again should the other
// end first.
type seat struct {
	name string
	log  *slog.Logger
	// patience bounds the wait for an old process that does not answer.
	patience time.Duration
	// hearing bounds the wait for somebody who has come to say what they want.
	// Others wait behind them.
	hearing time.Duration
	// conditions are told to those who ask what this process serves on with.
	conditions func() []string

	mu       sync.Mutex // guards what follows
	listener *net.UnixListener
	// before are connections to processes that this one took the seat from.
	// They are never closed: that would say that this process has ended.
	before []*net.UnixConn
	// after is the process that took the seat from this one.
	after *successor
}

func newSeat(log *slog.Logger, conditions func() []string) *seat {
	return &seat{name: seatName, log: log, patience: 30 * time.Second, hearing: time.Second, conditions: conditions}
}

const (
	wordTake  = "take\n"       // from the new process: it serves, let go
	wordGiven = "given\n"      // from the old one: it writes no more
	wordAsk   = "conditions\n" // from `signalbox ready`; the answer has a line for each
)

var (
	errStranger = errors.New("it belongs to another user")
	errAnswered = errors.New("it only asked for the conditions")
)

// take gets the seat, from whoever has it. Where the holder does not answer in
// time the error says so; the seat is tried for again with the next call.
func (s *seat) take(ctx context.Context) error {
	if s.mine() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	for {
		err := s.listen()
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
		err = s.ask(ctx)
		if hasLetGo(err) && wait.For(ctx, askAgain) {
			continue
		}
		if err != nil {
			return fmt.Errorf("the signalbox that serves this node does not let go: %w", err)
		}
	}
}

func (s *seat) mine() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.listener != nil
}

// inherited says whether another process has let go of the seat for this one.
func (s *seat) inherited() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.before) > 0
}

// askAgain is short, for a seat that changes hands, but not nothing: a holder
// that trusts nobody looks the same.
const askAgain = 10 * time.Millisecond

// hasLetGo says whether the holder ended, or gave the seat to somebody else,
// before it read what it was asked.
func hasLetGo(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}

// ask has the holder let go of the seat. The connection stays open for as long
// as this process lives: by it the other learns of its end.
func (s *seat) ask(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.name)
	if err != nil {
		return err
	}
	c := conn.(*net.UnixConn)
	deadline, _ := ctx.Deadline()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c.SetDeadline(deadline)
	if err = trusted(c); err == nil {
		err = tell(c, wordTake)
	}
	if err == nil {
		err = hear(c, wordGiven)
	}
	if err != nil {
		c.Close()
		return err
	}
	s.log.Info("the signalbox that served this node before has stopped writing")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = append(s.before, c)
	return nil
}

// alone waits until the processes have ended that served before; false if ctx
// ends first. They may have connections open.
func (s *seat) alone(ctx context.Context) bool {
	s.mu.Lock()
	before := slices.Clone(s.before)
	s.mu.Unlock()
	for _, c := range before {
		waitForEnd(ctx, c)
	}
	return ctx.Err() == nil
}

// waitForEnd returns when the other side of a connection has ended, or ctx.
func waitForEnd(ctx context.Context, c *net.UnixConn) {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c.SetReadDeadline(time.Time{})
	for {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return
		}
	}
}

func (s *seat) listen() error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.name, Net: "unix"})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener = l
	return nil
}

// successor is a process that serves and wants the seat.
type successor struct{ conn *net.UnixConn }

// waits returns the next process that wants the seat; nil when ctx ends.
func (s *seat) waits(ctx context.Context) *successor {
	s.mu.Lock()
	l := s.listener
	s.mu.Unlock()
	if l == nil {
		<-ctx.Done()
		return nil
	}
	l.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				s.log.Error("cannot learn of a signalbox that takes over", "error", err)
				<-ctx.Done()
			}
			return nil
		}
		if err := s.request(ctx, c); err != nil {
			level := slog.LevelWarn
			if errors.Is(err, io.EOF) || errors.Is(err, errAnswered) {
				level = slog.LevelDebug // signalbox ready
			}
			s.log.Log(ctx, level, "somebody asked for this signalbox's place, and is ignored", "error", err)
			c.Close()
			continue
		}
		return &successor{c}
	}
}

// request hears that the other side wants the seat. One that says nothing is
// not waited for longer than s.hearing, nor than ctx.
func (s *seat) request(ctx context.Context, c *net.UnixConn) error {
	if err := trusted(c); err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(s.hearing))
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Unix(1, 0))
		close(cut)
	})
	word, err := readWord(c)
	if !stop() {
		<-cut // or it could still cut off what is read later
	}
	switch {
	case err != nil:
		return err
	case word == wordAsk:
		return cmp.Or(s.answer(c), errAnswered)
	}
	return expect(word, wordTake)
}

// answer writes the conditions, one line each.
func (s *seat) answer(c *net.UnixConn) error {
	for _, text := range s.conditions() {
		if err := tell(c, strings.ReplaceAll(text, "\n", " ")+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// give lets go of the seat. Nothing may be written from before on.
func (s *seat) give(to *successor) error {
	s.leave()
	s.mu.Lock()
	s.after = to
	s.mu.Unlock()
	to.conn.SetDeadline(time.Now().Add(s.patience))
	return tell(to.conn, wordGiven)
}

// leave lets go of the seat without anybody asking.
func (s *seat) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listener != nil {
		s.listener.Close()
		s.listener = nil
	}
}

// standBy waits while another process has the seat; false if ctx ends first.
func (s *seat) standBy(ctx context.Context) bool {
	s.mu.Lock()
	to := s.after
	s.mu.Unlock()
	if to == nil {
		return true
	}
	waitForEnd(ctx, to.conn)
	if ctx.Err() != nil {
		return false // and the connection stays: this process may have others open
	}
	to.conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after = nil
	return true
}

func tell(c *net.UnixConn, word string) error {
	_, err := c.Write([]byte(word))
	return err
}

func readWord(c *net.UnixConn) (string, error) { return bufio.NewReaderSize(c, 16).ReadString('\n') }

func hear(c *net.UnixConn, want string) error {
	word, err := readWord(c)
	if err != nil {
		return err
	}
	return expect(word, want)
}

func expect(word, want string) error {
	if word != want {
		return fmt.Errorf("it said %q, not %q", word, want)
	}
	return nil
}

// trusted says whether the other side is of root or of this process's own user:
// in the host's network namespace anybody may use the socket.
func trusted(c *net.UnixConn) error {
	cred, err := peer(c)
	if err != nil {
		return err
	}
	return trustedUser(cred)
}

func trustedUser(cred *syscall.Ucred) error {
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %d", errStranger, cred.Uid)
	}
	return nil
}

// peer is who is on the other side.
func peer(c *net.UnixConn) (cred *syscall.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	controlErr := raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	return cred, errors.Join(controlErr, err)
}
