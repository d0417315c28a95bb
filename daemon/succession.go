package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

	mu       sync.Mutex // guards listener
	listener *net.UnixListener
}

func newSeat(log *slog.Logger) *seat {
	return &seat{name: seatName, log: log, patience: 30 * time.Second}
}

const (
	wordTake  = "take\n"  // from the new process: it serves, let go
	wordGiven = "given\n" // from the old one: it writes no more
)

var errStranger = errors.New("it belongs to another user")

// take gets the seat, from whoever has it. Where the holder does not answer in
// time the error says so; the seat is tried for again with the next call.
func (s *seat) take(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	for {
		err := s.listen()
		if err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return err
		}
		if err = s.ask(ctx); errors.Is(err, unix.ECONNREFUSED) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return fmt.Errorf("the signalbox that serves this node does not let go: %w", err)
		}
	}
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
	err = errors.Join(trusted(c), tell(c, wordTake))
	if err == nil {
		err = hear(c, wordGiven)
	}
	if err != nil {
		c.Close()
		return err
	}
	s.log.Info("the signalbox that served this node before has stopped writing")
	keepOpen(c)
	return nil
}

// kept are connections to predecessors. They are never closed: that would tell
// them that this process has ended.
var kept struct {
	sync.Mutex
	conns []*net.UnixConn
}

func keepOpen(c *net.UnixConn) {
	kept.Lock()
	defer kept.Unlock()
	kept.conns = append(kept.conns, c)
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
		c.SetDeadline(time.Now().Add(s.patience))
		if err := errors.Join(trusted(c), hear(c, wordTake)); err != nil {
			s.log.Warn("somebody asked for this signalbox's place, and is ignored", "error", err)
			c.Close()
			continue
		}
		return &successor{c}
	}
}

// give lets go of the seat. Nothing may be written from before on.
func (s *seat) give(to *successor) error {
	s.leave()
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

// outlive waits until the successor has ended, or ctx.
func (to *successor) outlive(ctx context.Context) {
	defer to.conn.Close()
	stop := context.AfterFunc(ctx, func() { to.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	to.conn.SetDeadline(time.Time{})
	for {
		if _, err := to.conn.Read(make([]byte, 1)); err != nil {
			return
		}
	}
}

func tell(c *net.UnixConn, word string) error {
	_, err := c.Write([]byte(word))
	return err
}

func hear(c *net.UnixConn, want string) error {
	word, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err == nil && word != want {
		err = fmt.Errorf("it said %q, not %q", word, want)
	}
	return err
}

// trusted says whether the other side is of root or of this process's own user:
// in the host's network namespace anybody may use the socket.
func trusted(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *syscall.Ucred
	if err := errors.Join(raw.Control(func(fd uintptr) {
		cred, err = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}), err); err != nil {
		return err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: %d", errStranger, cred.Uid)
	}
	return nil
}
